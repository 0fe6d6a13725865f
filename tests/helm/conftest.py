"""What tests of running pods start from."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets are below it, and their paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        yield Path(folder)
