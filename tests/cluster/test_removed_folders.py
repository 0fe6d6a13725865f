"""A coordinator's folders that somebody removes while it runs."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.calibrations.base import CalibrationRecord
from kvstore_cluster.catalogue import ClusterState, FileCatalogue
from kvstore_codec.errors import CatalogueError, UnknownCalibrationError

STATE = ClusterState(epoch=7, quotas={"blue": 5 << 30})


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[FileCatalogue]:
    catalogue = FileCatalogue(tmp_path / "data")
    yield catalogue
    catalogue.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_removed_catalogue_is_written_again(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(STATE)
    shutil.rmtree(tmp_path / "data")
    wait_until((tmp_path / "data" / "catalogue.json").exists)
    assert catalogue.load() == STATE
    with pytest.raises(CatalogueError, match="in use by another coordinator"):
        FileCatalogue(tmp_path / "data")


def test_what_was_found_at_the_start_is_written_again(tmp_path: Path) -> None:
    first = FileCatalogue(tmp_path / "data")
    first.save(STATE)
    first.close()
    again = FileCatalogue(tmp_path / "data")
    assert again.load() == STATE
    (tmp_path / "data" / "catalogue.json").unlink()
    wait_until((tmp_path / "data" / "catalogue.json").exists)
    assert again.load() == STATE
    again.close()


def test_a_decision_after_the_removal_is_kept(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(ClusterState(epoch=1))
    shutil.rmtree(tmp_path / "data")
    catalogue.save(STATE)
    assert catalogue.load() == STATE


def test_a_folder_that_another_coordinator_has_taken_is_not_written(
    catalogue: FileCatalogue, tmp_path: Path
) -> None:
    catalogue.save(ClusterState(epoch=1))
    with catalogue._writing:
        shutil.rmtree(tmp_path / "data")
        other = FileCatalogue(tmp_path / "data")
    other.save(STATE)
    with pytest.raises(CatalogueError, match="in use by another coordinator"):
        catalogue.save(ClusterState(epoch=2))
    assert other.load() == STATE
    other.close()


def test_removed_calibrations_are_not_offered_and_can_be_published_again(tmp_path: Path) -> None:
    registry = CalibrationRegistry(tmp_path / "calibrations")
    data = b"steps" * 1000
    record = CalibrationRecord(blake3(data).digest(), bytes(32), len(data))
    registry.put(record, [data])
    shutil.rmtree(tmp_path / "calibrations")
    assert registry.find(bytes(32)) is None
    assert registry.records() == ()
    with pytest.raises(UnknownCalibrationError):
        list(registry.pieces(record.digest))
    registry.put(record, [data])
    assert registry.find(bytes(32)) == record
    assert b"".join(registry.pieces(record.digest)) == data
