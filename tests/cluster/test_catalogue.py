import json
import os
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_cluster.catalogue import ClusterState, FileCatalogue, NodeRecord
from kvstore_codec.errors import CatalogueError
from tests.sample_chunk import sample_chunk

STATE = ClusterState(
    7,
    (
        NodeRecord(Member("node-0", "h:1", 2.5), 11, alive=True),
        NodeRecord(Member("b", "h:2"), 12, alive=False, error="gone"),
    ),
    pins={"": frozenset({sample_chunk(1).chunk_id}), "acme": frozenset({sample_chunk(2).chunk_id})},
    quotas={"": 5, "blue": 1 << 60},
    draining=frozenset({"b", "gone"}),
    repair_round=3,
    changes=9,
)


# As release 0.1 wrote it.
VERSION_1 = """{
 "format": "kvstore-catalogue",
 "version": 1,
 "state": {
  "epoch": 3,
  "nodes": [
   {
    "member": {"node_id": "node-0", "endpoint": "h:1", "weight": 0.5},
    "incarnation": 11,
    "alive": true,
    "error": ""
   }
  ]
 },
 "checksum": "f0220bfe2d776f01"
}"""


@pytest.fixture
def catalogue(tmp_path: Path):
    catalogue = FileCatalogue(tmp_path)
    yield catalogue
    catalogue.close()


def test_a_new_folder_is_made_and_holds_nothing(tmp_path: Path) -> None:
    catalogue = FileCatalogue(tmp_path / "a" / "b")
    assert catalogue.load() == ClusterState()
    catalogue.close()


def test_what_was_saved_is_loaded_by_the_next(tmp_path: Path) -> None:
    first = FileCatalogue(tmp_path)
    first.save(ClusterState(6))
    first.save(STATE)
    first.close()
    second = FileCatalogue(tmp_path)
    assert second.load() == STATE
    second.close()
    assert not (tmp_path / "catalogue.tmp").exists()


def test_a_half_written_file_aside_does_no_harm(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(STATE)
    (tmp_path / "catalogue.tmp").write_text('{"format": "kvst')
    assert catalogue.load() == STATE
    catalogue.save(ClusterState(8))
    assert catalogue.load() == ClusterState(8)


def test_any_damage_is_refused_by_name(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(STATE)
    path = tmp_path / "catalogue.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 4]) + sound[position + 1 :])
        try:
            # Harmless only where the flip hit the white space between the fields.
            assert catalogue.load() == STATE
        except CatalogueError as error:
            assert str(path) in str(error)  # noqa: PT017 (either outcome is right)
    for damaged in (b"", sound[: len(sound) // 2], b"null", b"[]", b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(CatalogueError, match="is damaged"):
            catalogue.load()
        assert path.read_bytes() == damaged


def test_another_version_is_refused(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(STATE)
    path = tmp_path / "catalogue.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    with pytest.raises(
        CatalogueError, match="version 3; this release reads kvstore-catalogue versions 1 and 2"
    ):
        catalogue.load()


def test_version_1_is_read_and_written_as_version_2(catalogue: FileCatalogue, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.json"
    path.write_text(VERSION_1)
    loaded = catalogue.load()
    assert loaded == ClusterState(3, (NodeRecord(Member("node-0", "h:1", 0.5), 11, alive=True),))
    catalogue.save(loaded)
    assert json.loads(path.read_text())["version"] == 2
    assert catalogue.load() == loaded


def test_a_folder_in_use_is_refused(catalogue: FileCatalogue, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="in use by another coordinator"):
        FileCatalogue(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogueError, match=r"file.* cannot be written .*--data-dir"):
        FileCatalogue(tmp_path / "file")
    with pytest.raises(CatalogueError, match="it is a file, not a folder"):
        FileCatalogue(tmp_path / "file")


def test_an_unwritable_folder_is_refused() -> None:
    # Not even root can make a folder there.
    with pytest.raises(CatalogueError, match=r"/proc/kvstore cannot be written \(it cannot be created: "):
        FileCatalogue(Path("/proc/kvstore"))


def test_a_save_that_fails_keeps_the_old_state(catalogue: FileCatalogue, tmp_path: Path) -> None:
    catalogue.save(STATE)
    (tmp_path / "catalogue.tmp").mkdir()
    with pytest.raises(CatalogueError, match="cannot be written"):
        catalogue.save(ClusterState(8))
    assert catalogue.load() == STATE


def test_a_closed_catalogue_writes_nothing_and_leaves_other_descriptors_alone(tmp_path: Path) -> None:
    """Its lock's descriptor may be somebody else's by then."""
    closed = FileCatalogue(tmp_path / "closed")
    closed.save(ClusterState(1))
    closed.close()
    with (tmp_path / "another").open("wb") as other:
        closed._lock_fd = os.dup(other.fileno())
        with pytest.raises(CatalogueError, match="was closed"):
            closed.save(ClusterState(2))
        os.fstat(closed._lock_fd)
        os.close(closed._lock_fd)
    again = FileCatalogue(tmp_path / "closed")
    assert again.load().epoch == 1
    again.close()
