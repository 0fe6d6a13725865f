"""How frames come: from reads, ahead of need, from the cache, or not at all."""

import threading
from collections.abc import Iterator

import pytest
import torch

from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameRead
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


def test_the_next_period_is_read_ahead_and_only_the_difference_later(
    prefix: Prefix, loader: FrameLoader
) -> None:
    check(prefix, 0, loader.take(0, [0, 2, 5]), [0, 2, 5])
    loader.read_ahead(1, [0, 2, 5])
    assert prefix.asked(0) == [(0, 0), (0, 2), (0, 5)]
    assert prefix.asked(1) == [(1, 0), (1, 2), (1, 5)]
    check(prefix, 1, loader.take(1, [0, 3, 5, 7]), [0, 3, 5, 7])
    assert prefix.asked(2) == [(1, 3), (1, 7)]
    assert len(prefix.reads) == 3
    report = prefix.report
    assert (report.frames_speculated, report.frames_speculated_right) == (3, 2)
    assert report.frames_read == 8
    assert report.bytes_read > report.bytes_needed


def test_reading_ahead_can_be_switched_off(prefix: Prefix) -> None:
    loader = prefix.loader(read_ahead=False)
    loader.take(0, [0, 2])
    loader.read_ahead(1, [0, 2])
    assert len(prefix.reads) == 1
    loader.take(1, [0, 3])
    assert prefix.asked(1) == [(1, 0), (1, 3)]
    assert prefix.report.frames_speculated == 0
    loader.close()


def test_what_proved_wrong_is_cancelled() -> None:
    slow = Prefix(answers=False)
    loader = slow.loader()
    found: list[dict[int, torch.Tensor]] = []

    def take(period: int, chosen: list[int], reads: int) -> threading.Thread:
        """Take in a thread that has made so many reads."""
        loader.begin(period, chosen)
        if period == 0:
            loader.read_ahead(1, chosen)
        taking = threading.Thread(target=lambda: found.append(loader.take(period, chosen)))
        taking.start()
        while len(slow.reads) < reads:
            taking.join(0.001)
        return taking

    first = take(0, [0, 1, 2], reads=2)
    assert slow.asked(1) == [(1, 0), (1, 1), (1, 2)]
    slow.deliver(slow.reads[0])
    first.join()
    second = take(1, [0, 3], reads=3)
    assert slow.reads[1].cancelled(0) == [1, 2]
    for read in slow.reads[1:]:
        slow.deliver(read)
    second.join()
    check(slow, 1, found[1], [0, 3])
    loader.close()
    assert slow.report.frames_cancelled == 2
    assert slow.report.bytes_read == slow.report.bytes_needed
    assert slow.report.waited_s > 0
    assert slow.report.reading_s > 0


def test_cached_frames_are_not_read(prefix: Prefix) -> None:
    first = prefix.loader(read_ahead=False)
    frames = first.take(0, [0, 3])
    first.keep(0, frames, {0: 0.5, 3: 0.1})
    first.close()
    second = prefix.loader(read_ahead=False)
    check(prefix, 0, second.take(0, [0, 3, 4]), [0, 3, 4])
    assert prefix.asked(1) == [(0, 4)]
    assert prefix.report.frames_cached == 2
    second.close()


def test_cached_frames_are_not_read_ahead(prefix: Prefix) -> None:
    first = prefix.loader(read_ahead=False)
    first.keep(1, first.take(1, [0, 3]), {0: 0.5, 3: 0.1})
    first.close()
    second = prefix.loader()
    second.take(0, [0, 3])
    second.read_ahead(1, [0, 3])
    check(prefix, 1, second.take(1, [0, 3]), [0, 3])
    assert len(prefix.reads) == 2
    second.close()


def test_a_frame_that_is_gone_is_left_out(prefix: Prefix) -> None:
    prefix.answers = False

    def read(tasks: "list[ReadTask]") -> FrameRead:
        made = prefix.read(tasks)
        prefix.fail(made, [1])
        prefix.deliver(made)
        return made

    loader = prefix.loader(read_ahead=False)
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

    loader = prefix.loader(read_ahead=False)
    loader._read_frames = read
    assert loader.take(0, [0, 4]) == {}
    assert sorted(prefix.unusable) == [0, 4]
    assert prefix.report.frames_missing == 2
    loader.close()


@pytest.mark.parametrize("limit", ["stall_s", "deadline_s"])
def test_what_is_late_is_given_up(prefix: Prefix, limit: str) -> None:
    prefix.answers = False
    loader = prefix.loader(read_ahead=False, **{limit: 0.05})
    assert loader.take(0, [0, 4]) == {}
    assert prefix.report.frames_missing == 2
    assert 0 < prefix.report.waited_s < 10
    assert prefix.reads[0].cancelled(0) == [0, 1]
    loader.close()


def test_a_failing_decoder_does_not_leave_the_engine_waiting(prefix: Prefix) -> None:
    loader = prefix.loader(read_ahead=False)

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
