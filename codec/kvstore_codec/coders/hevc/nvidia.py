"""Lossless HEVC on NVIDIA's engines, through PyNvVideoCodec 2: NVDEC decodes, NVENC encodes where there is one (A100,
H100, H200 and B200 have none).

Not yet run on a GPU: written against the library's documented interface.
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
# Sessions on one engine queue behind each other; a second one per engine hides the hand-over.
_SESSIONS_PER_ENGINE = 2
# A decoder is made for one size, chroma format and parameter sets; this many kinds are kept, the oldest goes first.
_KINDS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Capabilities:
    """`decodes`: 8-bit HEVC chroma formats and the largest (width, height) of each; `decode_engines`: how many work
    side by side; `encodes`: the formats that NVENC codes without loss."""

    decodes: dict[Chroma, tuple[int, int]]
    decode_engines: int
    encodes: frozenset[Chroma]
    why_no_encoder: str


@cache
def capabilities() -> Capabilities:
    """What this machine's GPU says it can do. Raises CoderUnavailableError without the library or a GPU."""
    nvc = _library()
    decodes, engines = {}, 0
    for chroma in Chroma:
        with _raised_as(CoderUnavailableError, "NVDEC does not say what it decodes"):
            caps = nvc.GetDecoderCaps(
                gpuid=_GPU,
                codec=nvc.cudaVideoCodec.HEVC,
                chromaformat=nvc.cudaVideoChromaFormat(int(chroma)),  # numbered as chroma_format_idc is
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
    """PyNvVideoCodec. Importing it loads the driver's video libraries, and fails with RuntimeError without them."""
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
    """The library raises exceptions of several classes that have no base of their own."""
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
    """Decoder sessions, each used by one thread at a time; threads beyond their number wait."""

    def __init__(self, number: int) -> None:
        # Each item holds the session's decoder by kind, in order of use.
        self._idle: queue.Queue[dict[_Kind, Any]] = queue.LifoQueue()
        for _ in range(number):
            self._idle.put({})

    def decode(self, packets: list[memoryview], kind: _Kind, out: torch.Tensor) -> None:
        """Fills `out`, [count, planes, height, width] on the GPU."""
        decoders = self._idle.get()
        # A decoder that has failed is not used again.
        decoder = decoders.pop(kind, None)
        try:
            decoder = decoder or _new_decoder(kind)
            seen = 0
            for data in (*packets, memoryview(b"")):
                # Surfaces are the decoder's own, and the next call overwrites them.
                for frame in _decode(decoder, data):
                    if seen < len(out):
                        out[seen].copy_(_planes(frame, kind, out.shape[1]))
                    seen += 1
                torch.cuda.current_stream(_GPU).synchronize()
            if seen != len(out):
                raise ChunkFormatError(f"NVDEC gave {seen} pictures of {len(out)}")
            decoders[kind] = decoder
            if len(decoders) > _KINDS_KEPT:
                del decoders[next(iter(decoders))]
        finally:
            self._idle.put(decoders)


class NvdecCoder(HevcCoder):
    """Decodes only; what hevc-cpu or hevc-nvenc encoded."""

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
        """Pictures of `shape`, [count, planes, height, width], uint8 on the GPU.

        Raises ChunkFormatError when `data` cannot be such pictures, CoderUnavailableError for a chroma format or a
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
    """Encodes too. One plane becomes 4:2:0 with constant chroma: NVENC has no monochrome."""

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
                True,  # pictures come from host memory  # noqa: FBT003
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
    with _raised_as(CodecError, f"NVDEC opens no session for {kind}"):
        return nvc.CreateDecoder(
            gpuid=_GPU,
            codec=nvc.cudaVideoCodec.HEVC,
            usedevicememory=True,
            maxwidth=kind.width,
            maxheight=kind.height,
            outputColorType=nvc.OutputColorType.NATIVE,
            # No picture points ahead, so decode order is display order and none has to wait.
            latency=nvc.DisplayDecodeLatencyType.ZERO,
        )


def _decode(decoder: Any, data: memoryview) -> list[Any]:
    """One whole picture, or the end of the stream."""
    nvc = _library()
    packet = nvc.PacketData()
    if data:
        # The decoder reads from this address: the array lives until it has.
        samples = np.frombuffer(data, np.uint8)
        packet.bsl_data, packet.bsl = samples.ctypes.data, samples.size
        packet.decode_flag = int(nvc.VideoPacketFlag.ENDOFPICTURE)
    with _raised_as(ChunkFormatError, "NVDEC refuses a picture"):
        frames: list[Any] = decoder.Decode(packet)
    return frames


def _planes(frame: Any, kind: _Kind, planes: int) -> torch.Tensor:
    """A view of the surface, [planes, height, width]: NV12 is the luma and then half as many rows of chroma, 4:4:4
    the three planes after each other."""
    surface = torch.utils.dlpack.from_dlpack(frame)
    rows = surface.numel() // kind.width
    if surface.numel() % kind.width or rows < planes * kind.height or surface.shape[-1] != kind.width:
        raise ChunkFormatError(f"NVDEC gave a surface of {tuple(surface.shape)} for {kind}")
    return surface.reshape(rows, kind.width)[: planes * kind.height].view(planes, kind.height, kind.width)


def _slices_after_one_set(stream: bytes) -> bytes:
    """The stream with one set of VPS, SPS and PPS in front, and no SEI or delimiters."""
    units = list(nal_units(stream))
    ends = [unit.start for unit in units[1:]] + [len(stream)]
    kept, seen = [], set()
    for unit, end in zip(units, ends, strict=True):
        if unit.kind in SLICES or (unit.kind in PARAMETER_SETS and unit.kind not in seen):
            seen.add(unit.kind)
            kept.append(stream[unit.start : end])
    return b"".join(kept)
