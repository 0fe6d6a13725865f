"""The calibration registry: whole and verified or not at all, and still there after a restart."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.calibrations import MAX_CALIBRATION_BYTES, MAX_PIECE_BYTES
from kvstore_cluster.calibrations import CalibrationRecord, CalibrationRegistry
from kvstore_codec.errors import (
    CalibrationSizeError,
    CalibrationTooLargeError,
    CatalogueError,
    DamagedCalibrationError,
    UnknownCalibrationError,
)

MODEL, OTHER_MODEL = b"m" * 32, b"n" * 32


@pytest.fixture
def registry(tmp_path: Path) -> CalibrationRegistry:
    return CalibrationRegistry(tmp_path)


def record(data: bytes, model_digest: bytes = MODEL) -> CalibrationRecord:
    return CalibrationRecord(blake3(data).digest(), model_digest, len(data))


def stored(registry: CalibrationRegistry, data: bytes, model_digest: bytes = MODEL) -> CalibrationRecord:
    kept = record(data, model_digest)
    registry.put(kept, [data])
    return kept


def test_what_was_put_comes_back_in_pieces(registry: CalibrationRegistry) -> None:
    data = os.urandom(MAX_PIECE_BYTES + 5)
    registry.put(record(data), [data[:7], b"", data[7:]])
    assert [len(piece) for piece in registry.pieces(record(data).digest)] == [MAX_PIECE_BYTES, 5]
    assert b"".join(registry.pieces(record(data).digest)) == data
    assert registry.records() == (record(data),)


def test_the_newest_of_a_model_is_found(registry: CalibrationRegistry) -> None:
    assert registry.find(MODEL) is None
    first, second = stored(registry, b"first"), stored(registry, b"second")
    stored(registry, b"foreign", OTHER_MODEL)
    assert registry.find(MODEL) == second
    stored(registry, b"first")
    assert registry.find(MODEL) == first
    assert len(registry.records()) == 3


def test_a_restart_loses_nothing_but_what_was_unfinished(
    registry: CalibrationRegistry, tmp_path: Path
) -> None:
    stored(registry, b"first")
    stored(registry, b"foreign", OTHER_MODEL)
    stored(registry, b"second")
    stored(registry, b"first")
    (tmp_path / "notes.txt").write_text("of the operator")
    (tmp_path / ".unfinished-x").write_bytes(b"fir")
    successor = CalibrationRegistry(tmp_path)
    assert successor.records() == registry.records()
    assert successor.find(MODEL) == record(b"first")
    assert b"".join(successor.pieces(record(b"first").digest)) == b"first"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".kvcal"] * 3 + [".txt"]


def test_an_acknowledged_calibration_survives_a_kill(tmp_path: Path) -> None:
    script = """
        import os, pathlib, signal, sys
        from blake3 import blake3
        from kvstore_cluster.calibrations import CalibrationRecord, CalibrationRegistry
        registry = CalibrationRegistry(pathlib.Path(sys.argv[1]))
        registry.put(CalibrationRecord(blake3(b"whole").digest(), b"m" * 32, 5), [b"whole"])
        def pieces():
            yield b"ha"
            os.kill(os.getpid(), signal.SIGKILL)
        registry.put(CalibrationRecord(blake3(b"half").digest(), b"m" * 32, 4), pieces())
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], check=False, timeout=60
    )
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert CalibrationRegistry(tmp_path).records() == (record(b"whole"),)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([b"01234", b"5678"], CalibrationSizeError),
        ([], CalibrationSizeError),
        ([b"01234", b"56789", b"x"], CalibrationSizeError),
        ([b"01234", b"5678X"], DamagedCalibrationError),
    ],
)
def test_other_bytes_than_announced_leave_nothing(
    registry: CalibrationRegistry, tmp_path: Path, pieces: list[bytes], error: type[Exception]
) -> None:
    with pytest.raises(error):
        registry.put(record(b"0123456789"), pieces)
    assert registry.records() == ()
    assert list(tmp_path.iterdir()) == []


def test_too_much_is_refused_before_a_byte_is_taken(registry: CalibrationRegistry) -> None:
    def pieces() -> Iterator[bytes]:
        raise AssertionError("asked for bytes")
        yield b""

    with pytest.raises(CalibrationTooLargeError, match="at most 1073741824"):
        registry.put(CalibrationRecord(b"d" * 32, MODEL, MAX_CALIBRATION_BYTES + 1), pieces())


def test_an_upload_that_breaks_off_leaves_nothing(registry: CalibrationRegistry, tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"01234"
        raise ConnectionAbortedError

    with pytest.raises(CatalogueError):
        registry.put(record(b"0123456789"), pieces())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_digest(registry: CalibrationRegistry) -> None:
    with pytest.raises(UnknownCalibrationError):
        list(registry.pieces(b"d" * 32))


@given(flipped=st.integers(0, 9))
def test_damage_on_disk_is_noticed_and_storing_again_repairs_it(
    tmp_path_factory: pytest.TempPathFactory, flipped: int
) -> None:
    folder = tmp_path_factory.mktemp("registry")
    registry = CalibrationRegistry(folder)
    kept = stored(registry, b"0123456789")
    (file,) = folder.iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[flipped] ^= 0x20
    file.write_bytes(damaged)
    with pytest.raises(DamagedCalibrationError, match="publish it again"):
        list(registry.pieces(kept.digest))
    stored(registry, b"0123456789")
    assert b"".join(registry.pieces(kept.digest)) == b"0123456789"


def test_a_reader_is_not_disturbed_by_a_writer_of_the_same(registry: CalibrationRegistry) -> None:
    data = os.urandom(2 * MAX_PIECE_BYTES)
    kept = stored(registry, data)
    reader = registry.pieces(kept.digest)
    begin = next(reader)
    stored(registry, data)
    assert begin + b"".join(reader) == data


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogueError, match="--data-dir"):
        CalibrationRegistry(tmp_path / "file")
