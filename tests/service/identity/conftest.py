from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.secured import SecuredCluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SecuredCluster]:
    made = SecuredCluster(tmp_path)
    yield made
    made.close()
