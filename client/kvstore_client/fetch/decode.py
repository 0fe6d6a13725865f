"""Decode stage: verified frames become KV in the destination, keys not yet rotated."""

import threading
from collections.abc import Callable, Sequence

import torch

from kvstore_client.fetch.base import Destination, ReadTask, ReceivedFrames
from kvstore_client.lookup import StoredChunk
from kvstore_codec.codec import decode_frames
from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt_frames import Prediction

ChunkFeatures = Callable[[int], torch.Tensor]
"""Index of a chunk in the match -> its `token_features`, f32 `[tokens, features]` in host memory."""


class Predictions:
    """What the chunks of a fetch are predicted to be: made once, when the first of a chunk's frames is decoded, and
    dropped after its last. Thread-safe."""

    def __init__(self, chunks: Sequence[StoredChunk], features: ChunkFeatures | None) -> None:
        self._features = features
        self._locks = [threading.Lock() for _ in chunks]
        self._undecoded_frames = [chunk.header.geometry.frame_count for chunk in chunks]
        self._made: dict[int, Prediction] = {}

    def of(self, task: ReadTask) -> Prediction | None:
        """None for a chunk that was coded without a calibration. Raises CalibrationError without features."""
        klt, index = task.chunk.klt, task.chunk_index
        if klt is None:
            return None
        with self._locks[index]:  # not one lock for all: decoders work on several chunks
            if index not in self._made:
                if self._features is None:
                    raise CalibrationError(
                        f"chunk {task.chunk.chunk_id.short} is coded as {task.chunk.header.encoding.name}: "
                        "give `fetch` the features of its tokens"
                    )
                self._made[index] = klt.predict(self._features(index))
            return self._made[index]

    def decoded(self, task: ReadTask) -> None:
        """These frames will not be decoded again."""
        index = task.chunk_index
        with self._locks[index]:
            self._undecoded_frames[index] -= task.frame_count
            if not self._undecoded_frames[index]:
                self._made.pop(index, None)


def decode(item: ReceivedFrames, destination: Destination, predictions: Predictions) -> None:
    """Raises CodecError for a frame that is not what its header says; the destination is then partly written."""
    task = item.task
    decode_frames(
        task.chunk.header,
        task.first_frame,
        task.frame_count,
        item.data,
        destination.buffers.keys[task.layers, :, task.tokens],
        destination.buffers.values[task.layers, :, task.tokens],
        klt=task.chunk.klt,
        prediction=predictions.of(task),
    )
    predictions.decoded(task)
