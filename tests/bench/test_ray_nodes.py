"""Ray nodes that do not start."""

import sys
from pathlib import Path

import pytest

from kvstore_bench.faults.ray_nodes import RayNodes
from kvstore_codec.errors import StartupError


def test_a_node_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named ray\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(StartupError, match="no module named ray"), RayNodes(tmp_path):
        pass
