"""Brings the frames of one request, from the cache and by reads that go on while the engine computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch

from kvstore_client.contiguous.busy_clock import BusyClock
from kvstore_client.contiguous.cache import FrameCache
from kvstore_client.contiguous.decoder import FrameDecoder
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameRead, FrameResult
from kvstore_client.miss_reason import MissReason
from kvstore_client.request_id import in_request
from kvstore_client.threads import single_threaded

log = logging.getLogger(__name__)

ReadFrames = Callable[[Sequence[ReadTask]], FrameRead]
"""Starts to read ranges of frames, and returns at once (`KVStoreClient.read_frames`)."""

_READS_AT_ONCE = 3
"""Reads in progress at once: that of a period, that of the next one, and one that was given up and has not ended."""

_Place: TypeAlias = tuple[int, int]
"""Period and index of a frame."""


class FrameLoader:
    """Loads the frames of a prefix period by period, for one request. One thread calls it. Never raises.

    For each period, in order: `begin` requests its set, and `take` returns it. What the engine computes in between
    goes on while the set is read (ContiguousKV, inter-period prefetch).
    """

    def __init__(
        self,
        grid: FrameGrid,
        read_frames: ReadFrames,
        decoder: FrameDecoder,
        cache: FrameCache,
        report: ReprefillReport,
        *,
        deadline_s: float,
        stall_s: float,
        device: torch.device,
    ) -> None:
        """`deadline_s` is the time for all reads together; a `take` during which nothing arrives for `stall_s` gives
        up. Frames are taken to `device`."""
        self._grid, self._read_frames, self._decoder, self._cache = grid, read_frames, decoder, cache
        self._report = report
        self._ends_s = time.monotonic() + deadline_s
        self._stall_s, self._device = stall_s, device
        self._changed = threading.Condition()
        self._awaited: set[_Place] = set()
        """Frames that were requested and have neither arrived nor failed."""
        self._arrived: dict[_Place, torch.Tensor] = {}
        self._asked: set[_Place] = set()
        """Frames that were requested from the nodes, whatever became of them."""
        self._lost: dict[_Place, MissReason] = {}
        """Frames that failed, and why."""
        self._reads: dict[int, list[FrameRead]] = {}
        """Reads of each period that has not been taken."""
        self._ended = -1
        """The latest period that was taken: nobody wants frames of it any more."""
        self._moved_s = time.monotonic()
        """When a frame last arrived."""
        self._reading = BusyClock()
        """Counts frames whose bytes are awaited."""
        self._workers = ThreadPoolExecutor(_READS_AT_ONCE, "kvstore-reprefill")

    def begin(self, period: int, chosen: Iterable[int]) -> None:
        """Take a period's set from the cache as far as it is there, and start to read the rest. Does not block. A frame
        is requested once, however often it is named."""
        with self._changed:
            new = [
                index
                for index in chosen
                if (period, index) not in self._asked and (period, index) not in self._arrived
            ]
        keys = {index: self._grid.key_of(period, index) for index in new}
        cached = self._cache.get(keys.values())
        wanted = [index for index in new if keys[index] not in cached]
        with self._changed:
            for index in new:
                if keys[index] in cached:
                    self._arrived[period, index] = cached[keys[index]]
            places = {(period, index) for index in wanted}
            self._asked |= places
            self._awaited |= places
            self._reading.begin(len(wanted))
        if not wanted:
            return
        try:
            # The engine computes meanwhile: it does not wait for a request to be made, and for its threads to start.
            self._workers.submit(in_request(self._read), period, wanted)
        except RuntimeError as error:
            self._fail_without_thread(period, wanted, error)

    def take(self, period: int, chosen: Sequence[int]) -> dict[int, torch.Tensor]:
        """The frames of a period's set by index, as FrameDecoder returns them. Begins to read them, unless `begin` did,
        and waits for them; frames that are evicted, damaged or too late are left out. Call it once for each period."""
        self.begin(period, chosen)
        needed = [(period, index) for index in chosen]
        read = [index for index in chosen if (period, index) in self._asked]
        report = self._report
        report.frames_needed += len(chosen)
        report.frames_cached += len(chosen) - len(read)
        report.bytes_needed += self._grid.size_bytes(period, read)
        began_s = time.monotonic()
        taken = self._wait(period, needed)
        report.waited_s += time.monotonic() - began_s
        for index in set(chosen).difference(taken):
            report.missing[self._lost.get((period, index), MissReason.INTERNAL_ERROR)] += 1
        return taken

    def keep(self, period: int, frames: Mapping[int, torch.Tensor], attention: Mapping[int, float]) -> None:
        """Count a use of these frames, which received these shares of the question's attention, and cache them."""
        keys = {index: self._grid.key_of(period, index) for index in frames}
        self._cache.used(
            {keys[index]: frame for index, frame in frames.items()},
            {keys[index]: attention[index] for index in frames},
        )

    def close(self) -> None:
        """End all reads and wait for their threads. May be called repeatedly."""
        self._end_reads(self._grid.periods)
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._report.reading_s = self._reading.seconds

    def _wait(self, period: int, needed: Sequence[_Place]) -> dict[int, torch.Tensor]:
        with self._changed:
            self._moved_s = max(self._moved_s, time.monotonic())
            while late := self._awaited.intersection(needed):
                now_s = time.monotonic()
                left_s = min(self._ends_s, self._moved_s + self._stall_s) - now_s
                if left_s <= 0:
                    why = MissReason.TIMEOUT if now_s >= self._ends_s else MissReason.STALLED
                    self._lost.update(dict.fromkeys(late, why))
                    break
                self._changed.wait(left_s)
            self._awaited.difference_update(needed)
            taken = {place[1]: self._arrived[place] for place in needed if place in self._arrived}
            for place in [p for p in self._arrived if p[0] == period]:
                del self._arrived[place]
        self._end_reads(period)
        return {index: frame.to(self._device) for index, frame in taken.items()}

    def _end_reads(self, period: int) -> None:
        """Cancel what is still read for this period and the ones before."""
        with self._changed:
            self._ended = max(self._ended, period)
            ended = [read for number, reads in self._reads.items() if number <= period for read in reads]
        for read in ended:
            read.cancel()

    def _read(self, period: int, indices: Sequence[int]) -> None:
        """Thread of one read: request its frames, and decode them as they arrive."""
        try:
            read = self._read_frames([self._task(period, index) for index in indices])
        except RuntimeError as error:
            self._fail_without_thread(period, indices, error)
            return
        with self._changed:
            self._reads.setdefault(period, []).append(read)
            is_late = period <= self._ended
        if is_late:
            read.cancel()
        unread = len(indices)
        try:
            with single_threaded(), torch.inference_mode():
                while results := read.take():
                    unread -= len(results)
                    self._decode(period, indices, results)
        except Exception:  # a bug must not leave the engine waiting
            log.exception("reading frames of a re-prefill failed")
            read.cancel()
        finally:
            self._fail(period, indices, unread, MissReason.INTERNAL_ERROR)

    def _decode(self, period: int, indices: Sequence[int], results: Sequence[FrameResult]) -> None:
        stored = {indices[result.index]: result.data for result in results if result.data is not None}
        received_bytes = sum(map(len, stored.values()))
        with self._changed:
            self._moved_s = time.monotonic()
            self._reading.end(len(results))
            self._report.frames_read += len(stored)
            self._report.bytes_read += received_bytes
            wanted = {i: data for i, data in stored.items() if (period, i) in self._awaited}
        decoded = self._decoder.decode(period, wanted)
        with self._changed:
            for index, frame in decoded.items():
                if (period, index) in self._awaited:
                    self._arrived[period, index] = frame
            for result in results:
                place = period, indices[result.index]
                self._awaited.discard(place)
                if place not in self._arrived:
                    self._lost.setdefault(place, result.missing or MissReason.UNDECODABLE)
            self._moved_s = time.monotonic()
            self._changed.notify_all()

    def _fail_without_thread(self, period: int, indices: Sequence[int], error: RuntimeError) -> None:
        """This process has no thread left to read these frames."""
        log.warning("%d frames of a re-prefill cannot be read: %s", len(indices), error)
        self._fail(period, indices, len(indices), MissReason.NO_RESOURCES)

    def _fail(self, period: int, indices: Sequence[int], unread: int, why: MissReason) -> None:
        """These frames will not arrive, unless they have. The bytes of `unread` of them did not come."""
        with self._changed:
            self._reading.end(unread)
            failed = self._awaited.intersection((period, index) for index in indices)
            self._awaited -= failed
            self._lost.update(dict.fromkeys(failed, why))
            self._changed.notify_all()

    def _task(self, period: int, index: int) -> ReadTask:
        grid = self._grid
        chunk, frame = grid.place_of(period, index)
        layers = grid.layers_of(period)
        return ReadTask(
            chunk,
            grid.chunks[chunk],
            grid.variants[chunk],
            frame,
            1,
            slice(layers.start, layers.stop),
            grid.tokens_of(index),
        )
