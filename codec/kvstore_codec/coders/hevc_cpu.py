"""Lossless HEVC in software: libx265 and FFmpeg's decoder, through PyAV.

A plane becomes one monochrome intra picture, in a raw Annex-B stream of exactly VPS, SPS, PPS and slices, so
that any HEVC decoder that takes 4:0:0 can read a frame without having seen another one.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from kvstore_codec.coders.base import Coder, Data, Plane
from kvstore_codec.coders.hevc_bitstream import require_one_gray_picture
from kvstore_codec.errors import ChunkFormatError, CodecError, CoderUnavailableError

# What NVDEC asks of HEVC: at least 144 samples a side, even sides.
_SMALLEST_SIDE = 144
_PADDING = 128

_ENCODER, _DECODER = "libx265", "hevc"

# One picture in, one picture out, in this thread alone. Blocks of 16 encode 1.6x as fast as blocks of 64 and
# cost .8 % of the size; slower presets take about 4x the time and buy nothing on noise.
_X265_PARAMETERS = ":".join(
    (
        "lossless=1",
        "keyint=1:open-gop=0:bframes=0:rc-lookahead=0:scenecut=0",
        "ctu=16",
        "pools=none:frame-threads=1:wpp=0:lookahead-slices=0",
        "annexb=1:repeat-headers=1:info=0:hash=0:aud=0",
        "log-level=none",
    )
)
_ENCODER_OPTIONS = {"preset": "ultrafast", "tune": "zerolatency", "x265-params": _X265_PARAMETERS}
_DECODER_OPTIONS = {"err_detect": "explode"}


@dataclass(frozen=True, slots=True)
class _Fold:
    """A [rows, cols] plane is cut into strips of `height` rows that stand side by side in the picture, which
    is about square; what they leave open is padding."""

    width: int
    height: int

    @classmethod
    def of(cls, rows: int, cols: int) -> _Fold:
        strips = max(1, round(math.sqrt(rows / cols)), -(-_SMALLEST_SIDE // cols))
        return cls(width=_side(min(strips, rows) * cols), height=_side(-(-rows // strips)))

    def copy(self, plane: Plane, picture: Plane, *, unfold: bool = False) -> None:
        rows, cols = plane.shape
        for strip, first in enumerate(range(0, rows, self.height)):
            part = plane[first : first + self.height]
            place = picture[: len(part), strip * cols : (strip + 1) * cols]
            if unfold:
                part[...] = place
            else:
                place[...] = part


def _side(samples: int) -> int:
    return max(_SMALLEST_SIDE, samples + samples % 2)


class _Contexts(threading.local):
    """One encoder, for pictures of the size this thread last encoded, and one decoder."""

    encoder: Any = None
    decoder: Any = None


class HevcCpuCoder(Coder):
    def __init__(self) -> None:
        for name, mode in ((_ENCODER, "w"), (_DECODER, "r")):
            try:
                av.codec.Codec(name, mode)
            except ValueError as error:
                raise CoderUnavailableError(
                    f"coder 'hevc-cpu' cannot run here: PyAV {av.__version__} was built without {name}"
                ) from error
        self._contexts = _Contexts()

    def encode(self, plane: Plane) -> bytes:
        fold = _Fold.of(*plane.shape)
        picture = np.full((fold.height, fold.width), _PADDING, np.uint8)
        fold.copy(plane, picture)
        encoder = self._encoder(fold)
        frame = av.VideoFrame.from_ndarray(picture, format="gray")
        try:
            packets = encoder.encode(frame)
        except av.FFmpegError as error:
            self._contexts.encoder = None
            raise CodecError(
                f"x265 cannot encode a picture of {fold.width} x {fold.height}: {error}"
            ) from error
        return b"".join(bytes(packet) for packet in packets)

    def decode(self, data: Data, out: Plane) -> None:
        fold = _Fold.of(*out.shape)
        require_one_gray_picture(data, fold.width, fold.height)
        contexts = self._contexts
        # A decoder that has failed is not used again.
        decoder, contexts.decoder = contexts.decoder or _new_decoder(), None
        try:
            frames = decoder.decode(av.Packet(data)) + decoder.decode(None)
        except av.FFmpegError as error:
            raise ChunkFormatError(f"the HEVC decoder refuses the picture: {error}") from error
        sizes = [(frame.format.name, frame.width, frame.height, frame.is_corrupt) for frame in frames]
        if sizes != [("gray", fold.width, fold.height, False)]:
            raise ChunkFormatError(f"the HEVC decoder gave {sizes} instead of one gray picture of {fold}")
        decoder.flush_buffers()
        contexts.decoder = decoder
        samples = np.frombuffer(frames[0].planes[0], np.uint8).reshape(fold.height, -1)
        fold.copy(out, samples, unfold=True)

    def _encoder(self, fold: _Fold) -> Any:
        encoder = self._contexts.encoder
        if encoder is None or (encoder.width, encoder.height) != (fold.width, fold.height):
            encoder = av.CodecContext.create(_ENCODER, "w")
            encoder.width, encoder.height, encoder.pix_fmt = fold.width, fold.height, "gray"
            encoder.time_base = Fraction(1, 1)
            encoder.thread_count = 1
            encoder.options = _ENCODER_OPTIONS
            self._contexts.encoder = encoder
        return encoder


def _new_decoder() -> Any:
    decoder = av.CodecContext.create(_DECODER, "r")
    decoder.thread_count = 1
    decoder.options = _DECODER_OPTIONS
    return decoder
