"""Lossless HEVC on NVIDIA's video engines, through PyNvVideoCodec 2. NVDEC decodes. NVENC encodes on GPUs that have it
(A100, H100, H200 and B200 do not).

This module has not run on a GPU yet; it follows the library's documentation.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from kvstore_codec.coders.base import Data, Plane
from kvstore_codec.coders.hevc.base import QUARTER_OR_FULL, HevcCoder, Prediction
from kvstore_codec.coders.hevc.bitstream import PARAMETER_SETS, SLICES, Chroma, nal_units, read_clip
from kvstore_codec.coders.hevc.pictures import PADDING, SMALLEST_SIDE, Pictures
from kvstore_codec.errors import ChunkFormatError, CodecError, CoderUnavailableError

_GPU = 0
_NAMES = {Chroma.MONOCHROME: "monochrome", Chroma.QUARTER: "4:2:0", Chroma.FULL: "4:4:4"}
# Sessions on one engine run one after another; a second session per engine hides the time between them.
_SESSIONS_PER_ENGINE = 2
# A decoder has one size, chroma format and set of parameter sets. The last so many kinds are kept.
_KINDS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Video capabilities of a GPU. `decodes`: 8-bit HEVC chroma formats and the largest (width, height) of each.
    `decode_engines`: number of NVDEC engines. `encodes`: the formats that NVENC codes without loss."""

    decodes: dict[Chroma, tuple[int, int]]
    decode_engines: int
    encodes: frozenset[Chroma]
    why_no_encoder: str


@cache
def capabilities() -> Capabilities:
    """Capabilities of this machine's GPU. Raises CoderUnavailableError without the library or a GPU."""
    nvc = _library()
    decodes, engines = {}, 0
    for chroma in Chroma:
        with _raised_as(CoderUnavailableError, "NVDEC does not report what it decodes"):
            caps = nvc.GetDecoderCaps(
                gpuid=_GPU,
                codec=nvc.cudaVideoCodec.HEVC,
                chromaformat=nvc.cudaVideoChromaFormat(int(chroma)),  # same numbers as chroma_format_idc
                bitdepth=8,
            )
        fits = max(caps.get("width_min", 0), caps.get("height_min", 0)) <= SMALLEST_SIDE
        if fits and caps.get("num_decoder_engines", 0):
            decodes[chroma] = (int(caps["width_max"]), int(caps["height_max"]))
            engines = max(engines, int(caps["num_decoder_engines"]))
    encodes, why = set(), "no engine of this GPU has a lossless mode"
    try:
        with _raised_as(CoderUnavailableError, "NVENC does not answer"):
            encoder = nvc.GetEncoderCaps(gpuid=_GPU, codec="hevc")
    except CoderUnavailableError as error:
        why = str(error)
    else:
        if encoder.get("num_encoder_engines", 0) and encoder.get("support_lossless_encode", 0):
            encodes.add(Chroma.QUARTER)
            if encoder.get("support_yuv444_encode", 0):
                encodes.add(Chroma.FULL)
    return Capabilities(decodes, engines, frozenset(encodes), why)


@cache
def _library() -> Any:
    """PyNvVideoCodec. Its import loads the driver's video libraries and raises RuntimeError if they are missing."""
    try:
        import PyNvVideoCodec
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CoderUnavailableError(
            f"NVIDIA's video engines cannot be used here: {reason}. They need an NVIDIA GPU, its driver with the "
            "video capability, and pip install 'kvstore-service[nvidia]'"
        ) from error
    return PyNvVideoCodec


@contextlib.contextmanager
def _raised_as(error_class: type[CodecError], what: str) -> Iterator[None]:
    """Maps the library's exceptions, which have no common base class, to `error_class`."""
    try:
        yield
    except Exception as error:
        raise error_class(f"{what}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Kind:
    chroma: Chroma
    width: int
    height: int
    parameter_sets: bytes = field(repr=False)


class _Sessions:
    """Pool of decoder sessions. One thread uses a session at a time; further threads wait for a free one."""

    def __init__(self, number: int) -> None:
        # Each item maps kinds to the session's decoders, in order of use.
        self._idle: queue.Queue[dict[_Kind, Any]] = queue.LifoQueue()
        for _ in range(number):
            self._idle.put({})

    def decode(self, packets: list[memoryview], kind: _Kind, out: torch.Tensor) -> None:
        """Fills `out`, [count, planes, height, width] on the GPU."""
        decoders = self._idle.get()
        # A decoder is put back only after a success: one that failed is not reused.
        decoder = decoders.pop(kind, None)
        try:
            decoder = decoder or _new_decoder(kind)
            seen = 0
            for data in (*packets, memoryview(b"")):
                # Surfaces belong to the decoder, and its next call overwrites them.
                for frame in _decode(decoder, data):
                    if seen < len(out):
                        out[seen].copy_(_planes(frame, kind, out.shape[1]))
                    seen += 1
                torch.cuda.current_stream(_GPU).synchronize()
            if seen != len(out):
                raise ChunkFormatError(f"NVDEC returned {seen} pictures of {len(out)}")
            decoders[kind] = decoder
            if len(decoders) > _KINDS_KEPT:
                del decoders[next(iter(decoders))]
        finally:
            self._idle.put(decoders)


class NvdecCoder(HevcCoder):
    """Decodes streams of hevc-cpu and hevc-nvenc; does not encode."""

    def __init__(self) -> None:
        found = capabilities()
        if Chroma.QUARTER not in found.decodes:
            raise CoderUnavailableError("coder 'hevc-nvdec' cannot run here: this GPU decodes no 8-bit HEVC")
        self._decodes = found.decodes
        self._sessions = _Sessions(_SESSIONS_PER_ENGINE * found.decode_engines)

    def encode_pictures(
        self,
        pictures: Pictures,  # noqa: ARG002
        prediction: Prediction = Prediction.INTRA,  # noqa: ARG002
    ) -> bytes:
        raise CoderUnavailableError("NVDEC only decodes: encode with hevc-cpu-420 or hevc-nvenc")

    def decode_on_gpu(self, data: Data, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Decodes pictures of `shape`, [count, planes, height, width], to uint8 on the GPU.

        Raises ChunkFormatError if `data` does not hold such pictures, CoderUnavailableError for a chroma format or
        size that this GPU does not decode.
        """
        clip = read_clip(data, shape)
        _, _, height, width = shape
        largest = self._decodes.get(clip.chroma)
        if largest is None or width > largest[0] or height > largest[1]:
            raise CoderUnavailableError(
                f"this GPU does not decode HEVC {_NAMES[clip.chroma]} of {width} x {height}, but "
                f"{ {_NAMES[chroma]: size for chroma, size in self._decodes.items()} }; use hevc-cpu"
            )
        pictures = torch.empty(shape, dtype=torch.uint8, device=f"cuda:{_GPU}")
        self._sessions.decode(clip.packets, _Kind(clip.chroma, width, height, clip.parameter_sets), pictures)
        return pictures

    def decoded(self, data: Data, shape: tuple[int, int, int, int]) -> Iterator[list[Plane]]:
        for picture in self.decode_on_gpu(data, shape).cpu().numpy():
            yield list(picture)


class NvencCoder(NvdecCoder):
    """Also encodes. It codes one plane as 4:2:0 with constant chroma, because NVENC has no monochrome."""

    def __init__(self) -> None:
        super().__init__()
        self._encodes = capabilities().encodes
        if not self._encodes:
            raise CoderUnavailableError(
                f"coder 'hevc-nvenc' cannot run here: {capabilities().why_no_encoder}; encode with hevc-cpu"
            )

    def encode_pictures(self, pictures: Pictures, prediction: Prediction = Prediction.INTRA) -> bytes:
        count, planes, height, width = pictures.shape
        chroma = QUARTER_OR_FULL[planes]
        if chroma not in self._encodes:
            raise CoderUnavailableError(f"this GPU does not encode HEVC {_NAMES[chroma]} without loss")
        surface_format = "NV12" if chroma is Chroma.QUARTER else "YUV444"
        rows = height * 3 // 2 if chroma is Chroma.QUARTER else 3 * height
        gop = 1 if prediction is Prediction.INTRA else count
        nvc = _library()
        with _raised_as(CodecError, f"NVENC cannot encode pictures of {width} x {height}"):
            encoder = nvc.CreateEncoder(
                width,
                height,
                surface_format,
                True,  # pictures are in host memory  # noqa: FBT003
                gpu_id=_GPU,
                codec="hevc",
                preset="P1",
                tuning_info="lossless",
                gop=gop,
                idrperiod=gop,
                bf=0,
            )
            coded = []
            surface = np.full((rows, width), PADDING, np.uint8)
            for picture in pictures:
                surface[: planes * height].reshape(planes, height, width)[...] = picture
                coded += encoder.Encode(surface)
            coded += encoder.EndEncode()
        return _slices_after_one_set(b"".join(bytes(packet["data"]) for packet in coded))


def _new_decoder(kind: _Kind) -> Any:
    nvc = _library()
    with _raised_as(CodecError, f"NVDEC cannot open a session for {kind}"):
        return nvc.CreateDecoder(
            gpuid=_GPU,
            codec=nvc.cudaVideoCodec.HEVC,
            usedevicememory=True,
            maxwidth=kind.width,
            maxheight=kind.height,
            outputColorType=nvc.OutputColorType.NATIVE,
            # No picture refers to a later one, so decode order is display order and no picture is delayed.
            latency=nvc.DisplayDecodeLatencyType.ZERO,
        )


def _decode(decoder: Any, data: memoryview) -> list[Any]:
    """Decodes one whole picture; an empty `data` ends the stream."""
    nvc = _library()
    packet = nvc.PacketData()
    if data:
        # The decoder reads from this address: the array must live until Decode returns.
        samples = np.frombuffer(data, np.uint8)
        packet.bsl_data, packet.bsl = samples.ctypes.data, samples.size
        packet.decode_flag = int(nvc.VideoPacketFlag.ENDOFPICTURE)
    with _raised_as(ChunkFormatError, "NVDEC refuses a picture"):
        frames: list[Any] = decoder.Decode(packet)
    return frames


def _planes(frame: Any, kind: _Kind, planes: int) -> torch.Tensor:
    """View of the surface, [planes, height, width]. An NV12 surface is the luma, then half as many rows of chroma; a
    4:4:4 surface is three planes in a row."""
    surface = torch.utils.dlpack.from_dlpack(frame)
    rows = surface.numel() // kind.width
    if surface.numel() % kind.width or rows < planes * kind.height or surface.shape[-1] != kind.width:
        raise ChunkFormatError(f"NVDEC returned a surface of {tuple(surface.shape)} for {kind}")
    return surface.reshape(rows, kind.width)[: planes * kind.height].view(planes, kind.height, kind.width)


def _slices_after_one_set(stream: bytes) -> bytes:
    """`stream` with one set of VPS, SPS and PPS at the start, and without SEI and delimiters."""
    units = list(nal_units(stream))
    ends = [unit.start for unit in units[1:]] + [len(stream)]
    kept, seen = [], set()
    for unit, end in zip(units, ends, strict=True):
        if unit.kind in SLICES or (unit.kind in PARAMETER_SETS and unit.kind not in seen):
            seen.add(unit.kind)
            kept.append(stream[unit.start : end])
    return b"".join(kept)
