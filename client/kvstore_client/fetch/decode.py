"""Decode stage: decodes verified frames into the destination's memory, with keys not yet rotated."""

import threading
from collections.abc import Callable, Sequence

import torch

from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.match import StoredChunk
from kvstore_codec.decoding import FramesTogether
from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt_frames import KLT, Prediction

ChunkFeatures = Callable[[int], torch.Tensor]
"""Maps a chunk's index in the match to its `token_features`, f32 `[tokens, features]` in host memory."""


class Predictions:
    """Predictions for the chunks of a fetch: made when the first frame of a chunk is decoded, kept until dropped.
    Thread-safe."""

    def __init__(self, chunks: Sequence[StoredChunk], features: ChunkFeatures | None) -> None:
        self._features = features
        self._locks = [threading.Lock() for _ in chunks]
        self._made: list[tuple[KLT, Prediction] | None] = [None] * len(chunks)

    def of(self, task: ReadTask) -> Prediction | None:
        """Prediction of the read's chunk; None for a chunk coded without a calibration. Raises CalibrationError without
        features."""
        klt, index = task.variant.klt, task.chunk_index
        if klt is None:
            return None
        with self._locks[index]:  # one lock per chunk: decoders work on several chunks
            made = self._made[index]
            if made is None or made[0] is not klt:
                if self._features is None:
                    raise CalibrationError(
                        f"chunk {task.chunk.chunk_id.short} is coded as {task.encoding.name}: "
                        "pass the features of its tokens to `fetch`"
                    )
                made = self._made[index] = klt, klt.predict(self._features(index))
            return made[1]

    def drop(self, index: int) -> None:
        """Drop the prediction of a chunk that is fully decoded."""
        with self._locks[index]:
            self._made[index] = None


def decode(
    item: ReceivedFrames,
    keys: torch.Tensor,
    values: torch.Tensor,
    predictions: Predictions,
    together: FramesTogether,
) -> None:
    """Decode into `keys` and `values`, `[layers, kv_heads, tokens, head_dim]` each, for the read of `item`. Frames that
    `together` decodes jointly are complete only after its own decoding. Raises CodecError for a frame that does not
    match its header; the tensors are then partly written."""
    task = item.task
    together.read(
        task.variant.header,
        task.first_frame,
        task.frame_count,
        item.data,
        keys,
        values,
        klt=task.variant.klt,
        prediction=predictions.of(task),
    )
