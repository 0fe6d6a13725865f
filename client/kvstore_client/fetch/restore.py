"""Restore stage: writes received KV to its place, with keys rotated to their positions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.fetch.decode import Predictions, decode
from kvstore_client.fetch.destination import Destination
from kvstore_client.fetch.receive import Receiver
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Costs
from kvstore_codec.decoding import FramesTogether
from kvstore_codec.errors import CodecError, SignatureError
from kvstore_codec.klt_frames import TOKENS_AT_ONCE
from kvstore_codec.rope import RotaryTable, rotate_layers_


@dataclass(slots=True)
class DecodedFrames:
    """Decoded frames of one task in the destination's memory, with keys not yet rotated."""

    task: ReadTask
    keys: torch.Tensor
    values: torch.Tensor
    began_disturbed: bool
    seconds: float = 0.0
    is_settled: bool = False
    """Whether they were delivered, or their chunk was reported missing."""


@dataclass(frozen=True, slots=True)
class Restorer:
    """Takes received frames through decode, restore and deliver. Several threads may run it."""

    receiver: Receiver
    destination: Destination
    rotary: tuple[RotaryTable, ...] | None
    """Each layer's rotary table, by position in the prompt; None: keys are stored as the engine caches them."""
    predictions: Predictions
    costs: Costs | None

    def run(self) -> None:
        """Process one range after the other until nothing more is received. Queued ranges that can be restored in one
        matrix product are processed together."""
        for first in self.receiver.out:
            together = FramesTogether()
            decoded: list[DecodedFrames] = []
            item: ReceivedFrames | None = first
            with self.failing_unfinished(decoded):
                while item is not None:
                    self.decode(item, together, decoded)
                    item = self.receiver.out.next_if(partial(_joins, together))
                self.finish_decode(together, decoded)
                self.restore_all(decoded)

    def decode(
        self, received: ReceivedFrames, together: FramesTogether, decoded: list[DecodedFrames]
    ) -> None:
        """Decode wanted frames. Frames that are invalid on every member make their chunk missing."""
        fetch_state, task = self.receiver.fetch_state, received.task
        if not fetch_state.begin_decode(task):
            return
        try:
            keys, values = self.destination.prepare(task.layers, task.tokens)
        except Exception as error:
            self._fail_to_place(task, error)
            return
        decoded.append(DecodedFrames(task, keys, values, self._is_disturbed))
        item: ReceivedFrames | None = received
        reason = MissReason.UNDECODABLE
        while item is not None:
            start_s = fetch_state.timeline.now_s()
            try:
                decode(item, keys, values, self.predictions, together)
            except CodecError as error:
                reason = MissReason.of_frames(error)
                if isinstance(error, SignatureError):
                    self.receiver.failover.refuse(task)
                self.receiver.metrics.failures.warn(
                    reason, f"a chunk from {task.chunk.member.endpoint} cannot be used ({reason}): {error}"
                )
            else:
                decoded[-1].seconds = self._note("decode", start_s, task)
                return
            # Another member with the same header may have the same invalid bytes.
            again = reason in (MissReason.CHECKSUM, MissReason.BAD_SIGNATURE)
            item = self.receiver.read_again(task) if again else None
            if item is not None:
                self.receiver.metrics.failed_over(reason)
        decoded.pop()
        fetch_state.fail(task, reason)

    @contextmanager
    def failing_unfinished(self, batch: list[DecodedFrames]) -> Iterator[None]:
        """When the block raises (a bug, no memory), fail all unsettled tasks of `batch`, so that nobody waits for
        them."""
        try:
            yield
        except BaseException:
            for decoded in batch:
                if not decoded.is_settled:
                    self.receiver.fetch_state.fail(decoded.task, MissReason.INTERNAL_ERROR)
            raise

    def finish_decode(self, together: FramesTogether, batch: list[DecodedFrames]) -> None:
        """Compute the values of the frames that `decode` added to `together`."""
        if together.tokens:
            start_s = self.receiver.fetch_state.timeline.now_s()
            together.restore_()
            share_s = self._note("decode", start_s, batch[0].task) / len(batch)
            for decoded in batch:
                decoded.seconds += share_s

    def restore_all(self, batch: list[DecodedFrames]) -> None:
        """Rotate the keys of decoded frames, write keys and values to their place, and deliver them to the engine."""
        fetch_state, layers = self.receiver.fetch_state, self.destination.layers
        for decoded in batch:
            task = decoded.task
            start_s = fetch_state.timeline.now_s()
            if self.rotary is not None:
                rotate_layers_(decoded.keys, self.rotary[task.layers], task.tokens)
            try:
                self.destination.complete(task.layers, task.tokens, decoded.keys, decoded.values)
            except Exception as error:
                decoded.is_settled = True
                self._fail_to_place(task, error)
                continue
            restore_s = self._note("restore", start_s, task)
            if self.costs is not None:
                token_layers = (task.tokens.stop - task.tokens.start) * (task.layers.stop - task.layers.start)
                self.costs.observe_decode(
                    task.encoding.name,
                    token_layers / layers,
                    decoded.seconds,
                    restore_s,
                    disturbed=(decoded.began_disturbed + self._is_disturbed) / 2,
                )
            decoded.is_settled = True
            if fetch_state.deliver(task):
                self.predictions.drop(task.chunk_index)

    def _fail_to_place(self, task: ReadTask, error: Exception) -> None:
        self.receiver.metrics.failures.warn(
            MissReason.DESTINATION, f"fetched KV cannot be written to the engine's memory: {error!r}"
        )
        self.receiver.fetch_state.fail(task, MissReason.DESTINATION)

    @property
    def _is_disturbed(self) -> bool:
        """Whether the engine computes rather than waits for this fetch."""
        return self.receiver.failover.links.is_computing and not self.receiver.fetch_state.is_engine_waiting

    def _note(self, stage: Literal["decode", "restore"], start_s: float, task: ReadTask) -> float:
        timeline = self.receiver.fetch_state.timeline
        end_s = timeline.now_s()
        timeline.add(stage, start_s, end_s, task.label, chunk=task.chunk_index, encoding=task.encoding.name)
        return end_s - start_s


def _joins(together: FramesTogether, item: ReceivedFrames) -> bool:
    variant = item.task.variant
    return (
        0 < together.tokens < TOKENS_AT_ONCE
        and variant.klt is not None
        and together.takes(variant.header, item.task.first_frame, variant.klt)
    )
