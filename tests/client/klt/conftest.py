import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration
from kvstore_service.calibration import Options, calibrate, plan_passages
from tests.client.conftest import ServedCluster
from tests.client.klt.calibrated import GREEDY, MEDIUM, PROMPT, Silent, publish, sharp_model
from tests.client.models import random_prompt


@pytest.fixture(scope="package")
def calibration() -> Calibration:
    text = random_prompt(2400, seed=9)[0]
    options = Options(period_layers=2, rank=8)
    return calibrate(ObservedModel(sharp_model()), plan_passages([text], 10**6, 8192), options, Silent())


@pytest.fixture
def new_client(cluster: ServedCluster, tmp_path: Path) -> Callable[..., KVStoreClient]:
    """A client as another process would have it: with a cache folder of its own unless one is given."""
    made = 0

    def connected(address: str = cluster.address, **settings: Any) -> KVStoreClient:
        nonlocal made
        made += 1
        folder = tmp_path / f"cache-{made}"
        return connect(address, **{"encoding": MEDIUM, "cache_dir": folder, "retry_after_s": 0.0, **settings})

    return connected


@pytest.fixture
def stored(cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]) -> int:
    """The prompt's chunks are stored as MEDIUM. Their bytes."""
    publish(cluster.address, calibration)
    with new_client() as client:
        CachedModel(sharp_model(), client).generate(PROMPT, **GREEDY)
        client.store.flush()
        counts = client.metrics.snapshot()
        assert counts["chunks_stored"] == 2
        assert counts["guarded_exact"] >= 0
        assert counts["guarded_finer"] >= 0
        return counts["bytes_out"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-calibration"]
