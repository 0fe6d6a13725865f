"""Restore stage: what was received becomes keys and values in their place, keys rotated to their position."""

from dataclasses import dataclass
from typing import Literal

from kvstore_client.fetch.base import Destination, ReadTask, ReceivedFrames
from kvstore_client.fetch.decode import Predictions, decode
from kvstore_client.fetch.receive import Receiver
from kvstore_client.ratio import Costs
from kvstore_codec.errors import CalibrationError, ChecksumError, CodecError
from kvstore_codec.rope import rotate_


def restore(task: ReadTask, destination: Destination) -> None:
    """Rotate the keys of a decoded range where they lie."""
    if destination.rotary is not None:
        for layer in range(task.layers.start, task.layers.stop):
            table = destination.rotary[layer].at(task.tokens)
            rotate_(destination.buffers.keys[layer, :, task.tokens], table)


@dataclass(frozen=True, slots=True)
class Restorer:
    """Takes what was received through decode, restore and deliver. Thread-safe: several threads may run it."""

    receiver: Receiver
    destination: Destination
    predictions: Predictions
    costs: Costs | None

    def run(self) -> None:
        """One range after the other, until nothing more is received."""
        for item in self.receiver.out:
            if (decode_s := self._decode(item)) is not None:
                self._restore(item.task, decode_s)

    def run_apart(self) -> None:
        """The stages one after the other, for measuring what the pipeline buys: receive, decode, restore all."""
        decoded = [(item.task, self._decode(item)) for item in list(self.receiver.out)]
        for task, decode_s in decoded:
            if decode_s is not None:
                self._restore(task, decode_s)

    def _decode(self, received: ReceivedFrames) -> float | None:
        """How long it took; None when it is not wanted any more, or bad wherever it is read: its chunk is missing."""
        progress, task = self.receiver.progress, received.task
        if not progress.begin_decode(task):
            return None
        item: ReceivedFrames | None = received
        reason = ""
        while item is not None:
            start_s = progress.timeline.now_s()
            try:
                decode(item, self.destination, self.predictions)
            except CodecError as error:
                reason = _reason(error)
            else:
                return self._note("decode", start_s, task)
            # Bytes that are not what the header says may be so elsewhere, where the same header is.
            item = self.receiver.read_again(task) if reason == "checksum" else None
            if item is not None:
                self.receiver.metrics.failed_over(reason)
        progress.fail(task, reason)
        return None

    def _restore(self, task: ReadTask, decode_s: float) -> None:
        progress, layers = self.receiver.progress, self.destination.buffers.keys.shape[0]
        start_s = progress.timeline.now_s()
        restore(task, self.destination)
        restore_s = self._note("restore", start_s, task)
        if self.costs is not None and not progress.is_engine_busy:
            token_layers = (task.tokens.stop - task.tokens.start) * (task.layers.stop - task.layers.start)
            self.costs.observe_decode(task.encoding.name, token_layers / layers, decode_s, restore_s)
        if progress.deliver(task):
            self.predictions.drop(task.chunk_index)

    def _note(self, stage: Literal["decode", "restore"], start_s: float, task: ReadTask) -> float:
        timeline = self.receiver.progress.timeline
        end_s = timeline.now_s()
        timeline.add(stage, start_s, end_s, task.label, chunk=task.chunk_index, encoding=task.encoding.name)
        return end_s - start_s


def _reason(error: CodecError) -> str:
    if isinstance(error, ChecksumError):
        return "checksum"
    return "calibration" if isinstance(error, CalibrationError) else "undecodable"
