"""The examples of README.md and docs/recompute.md, run as a user would: two processes, one document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_bench.demo.document import read_document
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import smollm2_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGES = {"ask.py": ROOT / "README.md", "ask_documents.py": ROOT / "docs" / "recompute.md"}


def _run(script: Path, *arguments: str | Path) -> list[int]:
    """The numbers in the last line it prints."""
    run = subprocess.run(
        [sys.executable, script, smollm2_folder(), *arguments],
        capture_output=True, text=True, timeout=500, check=True,
    )  # fmt: skip
    return [int(number) for number in re.findall(r"\d+", run.stdout.strip().splitlines()[-1])]


def _write(name: str, cluster: EmbeddedCluster, folder: Path) -> Path:
    """The example of this name, as a script that asks this cluster."""
    pattern = rf"<!-- {re.escape(name)}.*?-->\n```python\n(.*?)```"
    (code,) = re.findall(pattern, PAGES[name].read_text(), re.DOTALL)
    script = folder / name
    script.write_text(code.replace("127.0.0.1:7420", cluster.address))
    return script


def test_the_readme_example_reuses_in_the_second_process(
    ray_cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    script, document = _write("ask.py", ray_cluster, tmp_path), tmp_path / "report.txt"
    document.write_text(read_document(None)[:4500])
    reused = [_run(script, document, question) for question in ("Who wrote this?", "What is it about?")]
    (cold, _), (hit, prompt) = reused
    assert cold == 0
    assert hit % 256 == 0
    assert 700 < hit < prompt < hit + 300


def test_the_example_reuses_documents_in_another_order(ray_cluster: EmbeddedCluster, tmp_path: Path) -> None:
    script = _write("ask_documents.py", ray_cluster, tmp_path)
    text, documents = read_document(None), [tmp_path / "report.txt", tmp_path / "notes.txt"]
    for index, document in enumerate(documents):
        document.write_text(text[index * 2500 : (index + 1) * 2500])
    cold = _run(script, "What do they agree on?", *documents)
    assert (cold[0], cold[2]) == (0, 0)
    approximate, prompt, recomputed = _run(script, "What do they disagree on?", *reversed(documents))
    assert approximate % 256 == 0
    assert 700 < approximate < prompt
    assert recomputed == int(0.15 * approximate)
