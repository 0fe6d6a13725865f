"""Turns stored frames into KV at their positions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from typing_extensions import Buffer

from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.fetch.decode import ChunkFeatures
from kvstore_codec.decoding import FramesTogether
from kvstore_codec.errors import CodecError
from kvstore_codec.klt_frames import KLT, Prediction
from kvstore_codec.rope import RotaryTable, rotate_layers_

UnusableFrame = Callable[[int, CodecError], None]
"""Called with the index and the error of a frame that cannot be decoded."""


class FrameDecoder:
    """Decodes frames of one prefix. Thread-safe."""

    def __init__(
        self,
        grid: FrameGrid,
        rotary: tuple[RotaryTable, ...],
        features: ChunkFeatures,
        unusable: UnusableFrame,
    ) -> None:
        """`rotary` is each layer's table for the prefix's positions; `features` takes a chunk's index in the grid."""
        self._grid, self._rotary, self._features, self._unusable = grid, rotary, features, unusable
        self._lock = threading.Lock()
        self._predictions: dict[int, tuple[KLT, Prediction]] = {}

    def decode(self, period: int, stored: Mapping[int, Buffer]) -> dict[int, torch.Tensor]:
        """Verify and decode frames of a period, by index: keys, rotated to their positions, and values,
        `[2, layers, kv_heads, tokens, head_dim]` in host memory. A frame without its checksum, or that does not
        decode, is left out and reported. Frames of one calibration are restored in one product."""
        decoded: dict[int, torch.Tensor] = {}
        together = FramesTogether()
        for index, data in sorted(stored.items()):
            chunk, frame = self._grid.place_of(period, index)
            variant = self._grid.variants[chunk]
            header, klt = variant.header, variant.klt
            shape = (2, *header.geometry.frame_shape(frame))
            kv = torch.empty(shape, dtype=header.geometry.dtype.torch, device="cpu")
            try:
                if not together.takes(header, frame, klt):
                    together.restore_()
                prediction = None if klt is None else self._prediction(chunk, klt)
                together.read(header, frame, 1, data, kv[0], kv[1], klt=klt, prediction=prediction)
            except CodecError as error:
                self._unusable(index, error)
                continue
            decoded[index] = kv
        together.restore_()
        layers = self._grid.layers_of(period)
        for index, kv in decoded.items():
            rotate_layers_(kv[0], self._rotary[layers.start : layers.stop], self._grid.tokens_of(index))
        return decoded

    def _prediction(self, chunk: int, klt: KLT) -> Prediction:
        with self._lock:
            made = self._predictions.get(chunk)
            if made is None or made[0] is not klt:
                made = self._predictions[chunk] = klt, klt.predict(self._features(chunk))
            return made[1]
