"""The version before reads what this one has stored, and the reverse."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.upgrade import BEFORE, ROOT, measure


@pytest.mark.slow
def test_a_cluster_is_upgraded_and_goes_back(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None or subprocess.run([git, "cat-file", "-e", BEFORE], cwd=ROOT, check=False).returncode:
        pytest.skip(f"the history of this checkout does not have {BEFORE}, the version before")
    rows = measure(BEFORE, 20, tmp_path, turns=3)
    for turn, row in enumerate(rows):
        assert (row["stored"], row["exit_status"]) == (20, 0)
        assert row["read_right"] == row["stored_before"] == 20 * turn
        assert row["quotas_of_before"] == turn
