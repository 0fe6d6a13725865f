"""How frames come: from reads, from the cache, or not at all."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameRead
from kvstore_client.miss_reason import MissReason
from tests.client.contiguous.nodes import Prefix

ALL = list(range(8))


@pytest.fixture
def prefix() -> Prefix:
    return Prefix()


@pytest.fixture
def loader(prefix: Prefix) -> Iterator[FrameLoader]:
    loader = prefix.loader()
    yield loader
    loader.close()


def check(prefix: Prefix, period: int, frames: dict[int, torch.Tensor], indices: list[int]) -> None:
    assert sorted(frames) == indices
    for index, frame in frames.items():
        assert torch.equal(frame, prefix.frame(period, index))


def test_frames_come_rotated_to_their_positions(prefix: Prefix, loader: FrameLoader) -> None:
    check(prefix, 0, loader.take(0, ALL), ALL)
    check(prefix, 1, loader.take(1, ALL), ALL)
    assert prefix.report.frames_needed == prefix.report.frames_read == 16
    assert prefix.report.bytes_read == prefix.report.bytes_needed
    assert prefix.report.bytes_read == sum(len(part) for e in prefix.encoded for part in e.parts[1:])


def test_the_next_period_is_read_while_the_engine_computes(prefix: Prefix, loader: FrameLoader) -> None:
    check(prefix, 0, loader.take(0, [0, 2, 5]), [0, 2, 5])
    loader.begin(1, [0, 3, 5, 7])
    while len(prefix.reads) < 2 or not prefix.reads[1].is_complete:
        time.sleep(0.001)
    check(prefix, 1, loader.take(1, [0, 3, 5, 7]), [0, 3, 5, 7])
    assert prefix.asked(0) == [(0, 0), (0, 2), (0, 5)]
    assert prefix.asked(1) == [(1, 0), (1, 3), (1, 5), (1, 7)]
    assert len(prefix.reads) == 2
    assert prefix.report.frames_read == prefix.report.frames_needed == 7
    assert prefix.report.bytes_read == prefix.report.bytes_needed


def test_no_request_is_made_in_the_engines_thread(prefix: Prefix) -> None:
    makers: list[threading.Thread] = []

    def read(tasks: "list[ReadTask]") -> FrameRead:
        makers.append(threading.current_thread())
        return prefix.read(tasks)

    loader = prefix.loader()
    loader._read_frames = read
    loader.take(0, [0, 2])
    assert len(makers) == 1
    assert makers[0] is not threading.current_thread()
    loader.close()


def test_a_request_that_is_made_too_late_is_cancelled(prefix: Prefix) -> None:
    prefix.answers = False
    go_on = threading.Event()

    def read(tasks: "list[ReadTask]") -> FrameRead:
        go_on.wait()
        return prefix.read(tasks)

    loader = prefix.loader(stall_s=0.01)
    loader._read_frames = read
    assert loader.take(0, [0, 2]) == {}
    go_on.set()
    loader.close()
    assert prefix.reads[0].cancelled(0) == [0, 1]
    assert prefix.report.frames_missing == 2


def test_frames_are_missing_when_no_thread_is_left_to_request_them(prefix: Prefix) -> None:
    def read(tasks: "list[ReadTask]") -> FrameRead:
        raise RuntimeError("can't start new thread")

    loader = prefix.loader()
    loader._read_frames = read
    assert loader.take(0, [0, 2]) == {}
    assert prefix.report.missing == {MissReason.NO_RESOURCES: 2}
    loader.close()


def test_cached_frames_are_not_read(prefix: Prefix) -> None:
    first = prefix.loader()
    frames = first.take(0, [0, 3])
    first.keep(0, frames, {0: 0.5, 3: 0.1})
    first.close()
    second = prefix.loader()
    check(prefix, 0, second.take(0, [0, 3, 4]), [0, 3, 4])
    assert prefix.asked(1) == [(0, 4)]
    assert prefix.report.frames_cached == 2
    second.close()


def test_a_frame_that_is_gone_is_left_out(prefix: Prefix) -> None:
    prefix.answers = False

    def read(tasks: "list[ReadTask]") -> FrameRead:
        made = prefix.read(tasks)
        prefix.fail(made, [1])
        prefix.deliver(made)
        return made

    loader = prefix.loader()
    loader._read_frames = read
    check(prefix, 0, loader.take(0, [0, 4, 6]), [0, 6])
    assert prefix.report.frames_missing == 1
    loader.close()


def test_damaged_bytes_are_left_out(prefix: Prefix) -> None:
    prefix.answers = False

    def read(tasks: "list[ReadTask]") -> FrameRead:
        made = prefix.read(tasks)
        prefix.deliver(made, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        return made

    loader = prefix.loader()
    loader._read_frames = read
    assert loader.take(0, [0, 4]) == {}
    assert sorted(prefix.unusable) == [0, 4]
    assert prefix.report.frames_missing == 2
    loader.close()


@pytest.mark.parametrize("limit", ["stall_s", "deadline_s"])
def test_what_is_late_is_given_up(prefix: Prefix, limit: str) -> None:
    prefix.answers = False
    loader = prefix.loader(**{limit: 0.05})
    assert loader.take(0, [0, 4]) == {}
    assert prefix.report.frames_missing == 2
    assert 0 < prefix.report.waited_s < 10
    assert prefix.reads[0].cancelled(0) == [0, 1]
    loader.close()


def test_a_failing_decoder_does_not_leave_the_engine_waiting(prefix: Prefix) -> None:
    loader = prefix.loader()

    def fail(period: int, stored: object) -> dict[int, torch.Tensor]:
        raise RuntimeError("no memory")

    loader._decoder.decode = fail  # type: ignore[method-assign,assignment]
    assert loader.take(0, [0, 4]) == {}
    loader.close()


def test_a_closed_loader_has_ended_its_reads(prefix: Prefix) -> None:
    prefix.answers = False
    loader = prefix.loader(stall_s=0.01)
    loader.take(0, [0, 4])
    loader.close()
    loader.close()
    assert prefix.reads
    assert all(read.is_complete for read in prefix.reads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvstore-reprefill")]
