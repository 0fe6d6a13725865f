"""The example of docs/pages.md runs."""

import re
from pathlib import Path

import pytest

from tests.client.conftest import ServedCluster

PAGE = Path(__file__).parents[3] / "docs" / "pages.md"


def test_the_example_runs(two_node_cluster: ServedCluster, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"<!-- pages\.py.*?-->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code.replace("127.0.0.1:7420", two_node_cluster.address), {})  # noqa: S102
    assert capsys.readouterr().out == "2 (True, True)\n"
