"""Decodes frames of a chunk to KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    CalibrationError,
    ChunkFormatError,
    CodecError,
    ForeignChunkError,
    InvalidKVError,
)
from kvstore_codec.klt import PeriodKLT
from kvstore_codec.klt_frames import (
    KLT,
    DecodedFrame,
    Prediction,
    Restoration,
    decode_klt_frame,
    restore_together_,
)
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.payload import PayloadKind, PayloadReader
from kvstore_codec.quantise import decode_quantised
from kvstore_codec.words import decode_words, words_of


class FramesTogether:
    """Decodes frame ranges of one period, from any number of chunks. `read` decodes a range at once, except that frames
    of KLT coefficients wait for `restore_`, which restores them together in a fifth less time than chunk by chunk. Not
    thread-safe.

        together = FramesTogether()
        for each range: together.read(...)      # raises for this range only
        together.restore_()                     # now all KV is in its tensors
    """

    def __init__(self) -> None:
        self._klt: KLT | None = None
        self._period = -1
        self._pieces: list[Restoration] = []

    @property
    def tokens(self) -> int:
        """Number of tokens that wait for `restore_`. More than `klt_frames.TOKENS_AT_ONCE` at a time gain nothing."""
        return sum(piece.tokens for piece in self._pieces)

    def takes(self, header: ChunkHeader, first_frame: int, klt: KLT | None) -> bool:
        """Whether `read` accepts these frames before the next `restore_`. It accepts frames of the same period and
        calibration as those that wait, and frames that need no calibration."""
        period = first_frame // header.geometry.frames_per_period
        return not self._pieces or header.calibration is None or (self._klt, self._period) == (klt, period)

    def read(
        self,
        header: ChunkHeader,
        first_frame: int,
        frame_count: int,
        data: Buffer,
        out_keys: torch.Tensor,
        out_values: torch.Tensor,
        *,
        klt: KLT | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        """Like `decode_frames`, except that frames of KLT coefficients wait for `restore_`. `data` is not needed after
        this call. After an error no frame of this range waits, and earlier ranges are unaffected.

        Also raises InvalidKVError for frames that `takes` refuses, and for tensors on another device."""
        geometry = header.geometry
        period, slot = divmod(first_frame, geometry.frames_per_period)
        inside = 0 <= first_frame < first_frame + frame_count <= geometry.frame_count
        if not inside or slot + frame_count > geometry.frames_per_period:
            raise ChunkFormatError(
                f"chunk {header.chunk_id.short} does not have {frame_count} frames of one period "
                f"from frame {first_frame} on"
            )
        begin, end = geometry.tokens_of(slot).start, geometry.tokens_of(slot + frame_count - 1).stop
        shape = len(geometry.layers_of(period)), geometry.kv_heads, end - begin, geometry.head_dim
        require_kv("out_keys", out_keys, shape, geometry.dtype)
        require_kv("out_values", out_values, shape, geometry.dtype)
        if out_keys.device != out_values.device:
            raise InvalidKVError(
                f"keys are on {out_keys.device}, values on {out_values.device}; they must be on one device"
            )
        waiting = self._pieces[0].out_keys if self._pieces and header.calibration else out_keys
        alike = (waiting.device, waiting.dtype) == (out_keys.device, out_keys.dtype)
        if not alike or not self.takes(header, first_frame, klt):
            raise InvalidKVError(
                "only frames of one period, calibration, dtype and device are restored together"
            )
        transform: PeriodKLT | None = None
        keys, values = out_keys.detach(), out_values.detach()
        view, offset, coder = memoryview(data).cast("B"), 0, header.encoding.coder
        pieces: list[Restoration] = []
        neighbours: list[DecodedFrame] = []

        def wait(last: int) -> None:
            """Let the collected neighbours, which end at token `last`, wait for `restore_`."""
            if neighbours:
                tokens = slice(last - sum(frame.tokens for frame in neighbours), last)
                low = _require_prediction(header, prediction).at(
                    period, slice(begin + tokens.start, begin + tokens.stop)
                )
                pieces.append(Restoration([*neighbours], low, keys[:, :, tokens], values[:, :, tokens]))
                neighbours.clear()

        for frame in range(first_frame, first_frame + frame_count):
            length = header.frame_lengths[frame]
            payload, offset = view[offset : offset + length], offset + length
            header.verify_frame(frame, payload)
            with _naming(header, frame):
                reader = PayloadReader(payload)
                rows = geometry.tokens_of(frame % geometry.frames_per_period)
                tokens = slice(rows.start - begin, rows.stop - begin)
                k, v = keys[:, :, tokens], values[:, :, tokens]
                if reader.kind is PayloadKind.KLT:
                    transform = transform or _require_decoder(header, klt).periods[period]
                    neighbours.append(decode_klt_frame(reader, transform, k, coder))
                elif keys.is_cpu:
                    wait(tokens.start)
                    _DECODERS[reader.kind](reader, k, v, coder)
                else:
                    raise InvalidKVError(
                        f"{header.encoding.name} is decoded into host memory, not {keys.device}"
                    )
                reader.finish()
        wait(end - begin)
        if offset != view.nbytes:
            raise ChunkFormatError(f"{frame_count} frames have {view.nbytes - offset} bytes too many")
        if pieces:
            self._klt, self._period = klt, period
            self._pieces += pieces

    def restore_(self) -> None:
        """Restores the waiting frames to their tensors. Afterwards `read` accepts frames of any period."""
        pieces, self._pieces = self._pieces, []
        if pieces and self._klt is not None:
            restore_together_(self._klt.periods[self._period], pieces)


def require_kv(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: KVDtype) -> None:
    """Raises InvalidKVError for a tensor of another shape or dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype.torch:
        raise InvalidKVError(
            f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def require_klt(klt: KLT | None, encoding: Encoding) -> KLT:
    """Returns `klt`; raises CalibrationError if it is None."""
    if klt is None:
        raise CalibrationError(
            f"{encoding.name} needs the model's calibration; make one with `kvstore calibrate`"
        )
    return klt


def _require_decoder(header: ChunkHeader, klt: KLT | None) -> KLT:
    if header.calibration is None:
        raise ChunkFormatError(
            f"a frame of KLT coefficients is in a chunk that is coded as {header.encoding.name}"
        )
    klt = require_klt(klt, header.encoding)
    if klt.calibration.digest != header.calibration:
        raise CalibrationError(
            f"chunk {header.chunk_id.short} was coded with calibration {header.calibration.hex()[:16]}, "
            f"not with {klt.calibration.digest.hex()[:16]}"
        )
    geometry, shape = header.geometry, klt.calibration.periods[0].whitening.shape
    fits = (len(klt.periods), klt.calibration.period_layers, shape[2], shape[3]) == (
        geometry.periods,
        geometry.period_layers,
        geometry.kv_heads,
        geometry.head_dim,
    )
    if not fits or sum(period.layers for period in klt.calibration.periods) != geometry.layers:
        raise ChunkFormatError(
            f"the shape of chunk {header.chunk_id.short} differs from that of its calibration"
        )
    return klt


def _require_prediction(header: ChunkHeader, prediction: Prediction | None) -> Prediction:
    if prediction is None or prediction.tokens != header.geometry.tokens:
        raise InvalidKVError(
            f"chunk {header.chunk_id.short} ({header.encoding.name}) needs the prediction of its calibration for all "
            f"its {header.geometry.tokens} tokens: KLT.predict of their token_features"
        )
    return prediction


@contextmanager
def _naming(header: ChunkHeader, frame: int) -> Iterator[None]:
    """Adds the frame and chunk to errors raised inside."""
    try:
        yield
    except CodecError as error:
        error.add_note(f"in frame {frame} of chunk {header.chunk_id.short} ({header.encoding.name})")
        raise


def _decode_verbatim(reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, _coder: str) -> None:
    for out in (keys, values):
        words = words_of(out)
        words[...] = np.frombuffer(reader.take(words.nbytes), words.dtype).reshape(words.shape)


def _decode_byte_planes(reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, _coder: str) -> None:
    for out in (keys, values):
        decode_words(reader, words_of(out))


def _refuse_page(_reader: PayloadReader, _keys: torch.Tensor, _values: torch.Tensor, _coder: str) -> None:
    raise ForeignChunkError("the frame is a page of an engine's cache, not KV of tokens")


_DECODERS: dict[PayloadKind, Callable[[PayloadReader, torch.Tensor, torch.Tensor, str], None]] = {
    PayloadKind.VERBATIM: _decode_verbatim,
    PayloadKind.BYTE_PLANES: _decode_byte_planes,
    PayloadKind.QUANTISED: decode_quantised,
    PayloadKind.PAGE: _refuse_page,
}
