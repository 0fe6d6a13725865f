"""A real cluster whose documents are stored, and a worker that answers prompts made of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.blend.library import PATIENT, Library
from tests.client.blend.reference import sharp
from tests.client.conftest import served_cluster


@pytest.fixture
def library(tmp_path: Path, one_thread: None, request: pytest.FixtureRequest) -> Iterator[Library]:
    """Of a Llama, unless a test names another family."""
    with served_cluster(tmp_path, nodes=2) as cluster, connect(cluster.address, **PATIENT) as client:
        cached = CachedModel(sharp(getattr(request, "param", "llama")), client)
        yield Library(cluster, client, cached)
        cached.close()
        cluster.check_nothing_is_held()
