"""Minimal parser of HEVC bitstreams (ITU-T H.265). Before a decoder allocates memory, it checks that the bytes are the
expected number of pictures of the expected size, and finds the start of each picture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from kvstore_codec.coders.base import Data
from kvstore_codec.errors import ChunkFormatError

_START_CODE = re.compile(rb"\x00\x00\x01")
_START_CODE_BYTES = 3
_NAL_HEADER_BYTES = 2
# nal_unit_type, table 7-1.
_TRAIL = (0, 1)
_IDR = (19, 20)
SLICES = _IDR + _TRAIL
PARAMETER_SETS = _VPS, _SPS, _PPS = 32, 33, 34
# A coded picture is padded to whole coding blocks, of 64 samples at most; the rest is cropped.
_LARGEST_BLOCK = 64
# An SPS up to the bit depths fits easily, even if every ue(v) is as long as it can be.
_SPS_BYTES_READ = 96


class Chroma(IntEnum):
    """chroma_format_idc, table 6-1: no chroma; two chroma planes of half the width and height, which hold no samples
    here; three planes of equal size."""

    MONOCHROME = 0
    QUARTER = 1
    FULL = 3

    @property
    def planes(self) -> int:
        """Number of planes that hold samples."""
        return 3 if self is Chroma.FULL else 1


@dataclass(frozen=True, slots=True)
class Clip:
    """A parsed stream: its pictures in coding order, as the packets that decoders take."""

    chroma: Chroma
    parameter_sets: bytes
    """VPS, SPS and PPS. A decoder that cannot read one of them continues with that of an earlier stream. So only a new
    decoder, or one that has read the same parameter sets, decodes the clip correctly."""
    packets: list[memoryview]
    """One per picture; the first one includes the parameter sets."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A NAL unit (7.3.1.2): nal_unit_type, nuh_layer_id, nuh_temporal_id_plus1, the offset of its start code, and the
    bytes after its header, emulation prevention included."""

    kind: int
    layer: int
    temporal_plus1: int
    start: int
    payload: memoryview


def read_clip(data: Data, shape: tuple[int, int, int, int]) -> Clip:
    """Parses an Annex-B stream: one set of VPS, SPS and PPS, then 8-bit pictures of `shape`,
    [count, planes, height, width], the first of them IDR, the others IDR or trailing. Raises ChunkFormatError for
    anything else."""
    count, planes, height, width = shape
    chroma: Chroma | None = None
    starts: list[int] = []
    for position, unit in enumerate(nal_units(data)):
        expected = PARAMETER_SETS[position : position + 1] or (SLICES if starts else _IDR)
        if (unit.layer, unit.temporal_plus1) != (0, 1) or unit.kind not in expected:
            raise ChunkFormatError(
                f"HEVC unit {position} is of kind {unit.kind}, layer {unit.layer}, time layer "
                f"{unit.temporal_plus1 - 1}; a frame has parameter sets and pictures of one layer only"
            )
        if unit.kind == _SPS:
            chroma = _read_sps(unit.payload, planes, width, height)
        elif unit.kind not in PARAMETER_SETS and _opens_picture(unit):
            starts.append(unit.start)
    if chroma is None or len(starts) != count:
        raise ChunkFormatError(f"an HEVC frame has {len(starts)} pictures instead of {count}")
    view = memoryview(data)
    edges = [0, *starts[1:], len(view)]
    return Clip(chroma, bytes(view[: starts[0]]), [view[edge:end] for edge, end in itertools.pairwise(edges)])


def nal_units(data: Data) -> Iterator[Unit]:
    """The NAL units of a stream. Raises ChunkFormatError for a unit that is too short for a header."""
    view = memoryview(data)
    edges = itertools.chain((match.start() for match in _START_CODE.finditer(view)), (len(view),))
    for edge, end in itertools.pairwise(edges):
        start = edge + _START_CODE_BYTES
        if end - start < _NAL_HEADER_BYTES:
            raise ChunkFormatError("an HEVC unit without a header")
        header = int.from_bytes(view[start : start + _NAL_HEADER_BYTES], "big")
        payload = view[start + _NAL_HEADER_BYTES : end]
        yield Unit(header >> 9 & 0x3F, header >> 3 & 0x3F, header & 7, edge, payload)


def _opens_picture(unit: Unit) -> bool:
    """Whether first_slice_segment_in_pic_flag (7.3.6.1) is set."""
    return bool(unit.payload) and bool(unit.payload[0] >> 7)


def _read_sps(sps: memoryview, planes: int, width: int, height: int) -> Chroma:
    """Chroma format of a sequence parameter set (7.3.2.2.1). Raises ChunkFormatError if it announces other pictures."""
    bits = _Bits(bytes(sps[:_SPS_BYTES_READ]).replace(b"\0\0\3", b"\0\0"))
    bits.take(4)  # sps_video_parameter_set_id
    if bits.take(3):  # sps_max_sub_layers_minus1
        raise ChunkFormatError("an HEVC picture in several temporal layers is not a frame")
    bits.take(1)  # sps_temporal_id_nesting_flag
    bits.take(88 + 8)  # profile_tier_level: general profile and level (7.3.3)
    bits.take_golomb()  # sps_seq_parameter_set_id
    chroma_format_idc = bits.take_golomb()
    if chroma_format_idc not in tuple(Chroma) or (chroma := Chroma(chroma_format_idc)).planes != planes:
        raise ChunkFormatError(
            f"an HEVC picture in chroma format {chroma_format_idc} does not have {planes} planes"
        )
    if chroma is Chroma.FULL and bits.take(1):  # separate_colour_plane_flag
        raise ChunkFormatError("an HEVC picture whose colours are coded as three pictures is not a frame")
    coded = bits.take_golomb(), bits.take_golomb()
    left, right, top, bottom = (
        [bits.take_golomb() for _ in range(4)] if bits.take(1) else (0, 0, 0, 0)  # conformance_window_flag
    )
    unit = 2 if chroma is Chroma.QUARTER else 1  # SubWidthC and SubHeightC, table 6-1
    shown = coded[0] - unit * (left + right), coded[1] - unit * (top + bottom)
    if shown != (width, height) or max(coded[0] - width, coded[1] - height) >= _LARGEST_BLOCK:
        raise ChunkFormatError(
            f"an HEVC picture of {shown[0]} x {shown[1]}, coded as {coded[0]} x {coded[1]}, is not one of "
            f"{width} x {height}"
        )
    if bits.take_golomb() or bits.take_golomb():  # bit_depth_luma_minus8, bit_depth_chroma_minus8
        raise ChunkFormatError("an HEVC picture of more than 8 bits is not a frame")
    return chroma


class _Bits:
    """Bit reader, most significant bit first. Raises ChunkFormatError past the end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def take(self, count: int) -> int:
        if count > self._left:
            raise ChunkFormatError("an HEVC parameter set ends too early")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def take_golomb(self) -> int:
        """An Exp-Golomb code, ue(v) (9.2)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
