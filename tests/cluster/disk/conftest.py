import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.disk.image import Image, make_image
from tests.cluster.disk.index import Index, opened

MEMORY = Path("/dev/shm")  # noqa: S108


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, for tests that open a store thousands of times."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    store = opened(tmp_path / "store")
    store.recover()
    index = Index(store)
    yield index
    index.check()
    store.close()


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("image"))
