"""Lossless HEVC in software: libx265 and FFmpeg's decoder, through PyAV."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from kvstore_codec.coders.base import Data, Plane
from kvstore_codec.coders.hevc.base import MONOCHROME_OR_FULL, QUARTER_OR_FULL, HevcCoder, Prediction
from kvstore_codec.coders.hevc.bitstream import SLICES, Chroma, nal_units, read_clip
from kvstore_codec.coders.hevc.pictures import PADDING, Pictures
from kvstore_codec.errors import ChunkFormatError, CodecError, CoderUnavailableError

_ENCODER, _DECODER = "libx265", "hevc"

_PIXEL_FORMATS = {Chroma.MONOCHROME: "gray", Chroma.QUARTER: "yuv420p", Chroma.FULL: "yuv444p"}

# x265 returns each picture at once and uses only the calling thread. Blocks of 16 encode 1.6x as fast as blocks of 64
# for .8 % more bytes; slower presets take about 4x the time and save nothing on noise. Filters do not change lossless
# blocks, but with a filter enabled x265 writes a flag that depends on the number of the picture.
_X265_PARAMETERS = ":".join(
    (
        "lossless=1",
        "open-gop=0:bframes=0:rc-lookahead=0:scenecut=0",
        "ctu=16:no-deblock=1",
        "pools=none:frame-threads=1:wpp=0:lookahead-slices=0",
        "annexb=1:repeat-headers=1:info=0:hash=0:aud=0",
        "log-level=none",
    )
)
# With INTER, a stream begins only where an IDR picture is forced.
_KEYINT = {Prediction.INTRA: "keyint=1", Prediction.INTER: "keyint=-1"}
_DECODER_OPTIONS = {"err_detect": "explode"}
# The height of KLT pictures depends on the text, and a thread sees the same few sizes repeatedly.
_DECODERS_KEPT = 8


@dataclass(frozen=True, slots=True)
class _Format:
    chroma: Chroma
    width: int
    height: int
    prediction: Prediction

    def new_encoder(self) -> Any:
        encoder = av.CodecContext.create(_ENCODER, "w")
        encoder.width, encoder.height = self.width, self.height
        encoder.pix_fmt = _PIXEL_FORMATS[self.chroma]
        encoder.time_base = Fraction(1, 1)
        encoder.thread_count = 1
        encoder.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "forced-idr": "1",
            "x265-params": f"{_X265_PARAMETERS}:{_KEYINT[self.prediction]}",
        }
        return encoder

    def frame(self, picture: Pictures) -> Any:
        """`picture` is [planes, height, width]."""
        frame = av.VideoFrame(self.width, self.height, _PIXEL_FORMATS[self.chroma])
        for index, plane in enumerate(frame.planes):
            samples = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            samples[:, : plane.width] = picture[index] if index < self.chroma.planes else PADDING
        return frame


class _Contexts(threading.local):
    """One encoder for the picture format that this thread last encoded, and decoders by the parameter sets that they
    have read, in order of use."""

    encoder: Any = None
    encoder_format: _Format | None = None

    def __init__(self) -> None:
        self.decoders: dict[bytes, Any] = {}


class HevcCpuCoder(HevcCoder):
    """Encodes with libx265 and decodes with FFmpeg."""

    _chroma: Mapping[int, Chroma] = MONOCHROME_OR_FULL

    def __init__(self) -> None:
        for name, mode in ((_ENCODER, "w"), (_DECODER, "r")):
            try:
                av.codec.Codec(name, mode)
            except ValueError as error:
                raise CoderUnavailableError(
                    f"coder 'hevc-cpu' cannot run here: PyAV {av.__version__} was built without {name}"
                ) from error
        self._contexts = _Contexts()

    def encode_pictures(self, pictures: Pictures, prediction: Prediction = Prediction.INTRA) -> bytes:
        _, planes, height, width = pictures.shape
        picture_format = _Format(self._chroma[planes], width, height, prediction)
        contexts = self._contexts
        if contexts.encoder_format != picture_format:
            contexts.encoder, contexts.encoder_format = picture_format.new_encoder(), picture_format
        parts: list[bytes] = []
        try:
            for picture in pictures:
                frame = picture_format.frame(picture)
                if not parts:
                    frame.pict_type = av.video.frame.PictureType.I
                coded = b"".join(bytes(packet) for packet in contexts.encoder.encode(frame))
                parts.append(_without_parameter_sets(coded) if parts else coded)
        except av.FFmpegError as error:
            contexts.encoder = contexts.encoder_format = None
            raise CodecError(f"x265 cannot encode pictures of {width} x {height}: {error}") from error
        return b"".join(parts)

    def decoded(self, data: Data, shape: tuple[int, int, int, int]) -> Iterator[list[Plane]]:
        count, planes, height, width = shape
        clip = read_clip(data, shape)
        wanted = (_PIXEL_FORMATS[clip.chroma], width, height, False)
        decoders = self._contexts.decoders
        # A decoder is put back only after a success: one that failed is not reused.
        decoder = decoders.pop(clip.parameter_sets, None) or _new_decoder()
        seen: list[Any] = []
        for packet in (*clip.packets, None):
            try:
                frames = decoder.decode(None if packet is None else av.Packet(packet))
            except MemoryError:  # FFmpeg's own is also an FFmpegError, but the stream is not its cause
                raise
            except av.FFmpegError as error:
                raise ChunkFormatError(f"the HEVC decoder refuses a picture: {error}") from error
            for frame in frames:
                found = (frame.format.name, frame.width, frame.height, frame.is_corrupt)
                seen.append(frame)
                if found != wanted or len(seen) > count:
                    raise ChunkFormatError(
                        f"the HEVC decoder returned {found} as picture {len(seen)} of {count}, not {wanted}"
                    )
                yield [
                    np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
                    for plane in frame.planes[:planes]
                ]
        if len(seen) != count:
            raise ChunkFormatError(f"the HEVC decoder returned {len(seen)} pictures of {count}")
        decoder.flush_buffers()
        _clear(seen)
        decoders[clip.parameter_sets] = decoder
        if len(decoders) > _DECODERS_KEPT:
            del decoders[next(iter(decoders))]


class HevcCpu420Coder(HevcCpuCoder):
    """`hevc-cpu`, but codes one plane as 4:2:0 with constant chroma, for decoders without monochrome."""

    _chroma = QUARTER_OR_FULL


def _clear(pictures: list[Any]) -> None:
    """Zeroes the memory of decoded pictures. FFmpeg decodes into the memory of earlier pictures and leaves it unchanged
    after the point where a damaged picture ends. With zeroed memory, reused decoders behave like new ones."""
    for picture in pictures:
        for plane in picture.planes:
            np.frombuffer(plane, np.uint8)[...] = 0


def _new_decoder() -> Any:
    decoder = av.CodecContext.create(_DECODER, "r")
    decoder.thread_count = 1
    decoder.options = _DECODER_OPTIONS
    return decoder


def _without_parameter_sets(coded: bytes) -> bytes:
    """`coded` from its first slice on: the parameter sets of the first picture also apply to later ones."""
    return coded[next(unit.start for unit in nal_units(coded) if unit.kind in SLICES) :]
