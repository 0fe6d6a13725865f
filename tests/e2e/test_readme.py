"""The lines that the README shows, run as a user would: two processes, one document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_service.demo.document import read_document
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import smollm2_folder

pytestmark = pytest.mark.slow
README = Path(__file__).parents[2] / "README.md"


def test_the_readme_example_reuses_in_the_second_process(
    ray_cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    (code,) = re.findall(r"<!-- ask\.py.*?-->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    script, document = tmp_path / "ask.py", tmp_path / "report.txt"
    script.write_text(code.replace("127.0.0.1:7420", ray_cluster.address))
    document.write_text(read_document(None)[:9000])
    reused = []
    for question in ("Who wrote this?", "What is it about?"):
        run = subprocess.run(
            [sys.executable, script, smollm2_folder(), document, question],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        last = run.stdout.strip().splitlines()[-1]
        reused.append([int(number) for number in re.findall(r"\d+", last)])
    (cold, _), (hit, prompt) = reused
    assert cold == 0
    assert hit % 256 == 0
    assert 1500 < hit < prompt < hit + 300
