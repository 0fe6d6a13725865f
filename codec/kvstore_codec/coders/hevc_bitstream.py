"""Just enough of the HEVC bitstream (ITU-T H.265) to know, before a decoder allocates anything, that some
bytes are one intra picture of an expected size."""

from __future__ import annotations

import itertools
import re

from kvstore_codec.coders.base import Data
from kvstore_codec.errors import ChunkFormatError

_START_CODE = re.compile(rb"\x00\x00\x01")
_START_CODE_BYTES = 3
_NAL_HEADER_BYTES = 2
# nal_unit_type, table 7-1.
_VPS, _SPS, _PPS = 32, 33, 34
_IDR = (19, 20)
# A coded picture is padded to whole coding blocks, of 64 samples at most; the rest is cropped.
_LARGEST_BLOCK = 64
# An SPS up to the picture's height fits easily, even if every ue(v) is as long as it can be.
_SPS_BYTES_READ = 64


def require_one_gray_picture(data: Data, width: int, height: int) -> None:
    """Raises ChunkFormatError unless `data` is an Annex-B stream of one set of VPS, SPS and PPS and then one
    IDR picture, monochrome, that is coded as `width` x `height` padded to whole blocks."""
    pictures = 0
    for position, (kind, layer, payload) in enumerate(_nal_units(data)):
        expected = (_VPS, _SPS, _PPS)[position : position + 1] or _IDR
        if layer != 0 or kind not in expected:
            raise ChunkFormatError(
                f"HEVC unit {position} is of kind {kind}, layer {layer}; a frame is one picture"
            )
        if kind == _SPS:
            coded_width, coded_height = _gray_picture_size(payload)
            if not (
                0 <= coded_width - width < _LARGEST_BLOCK and 0 <= coded_height - height < _LARGEST_BLOCK
            ):
                raise ChunkFormatError(
                    f"an HEVC picture of {coded_width} x {coded_height} is not one of {width} x {height}"
                )
        if kind in _IDR:
            # first_slice_segment_in_pic_flag (7.3.6.1)
            pictures += bool(payload) and payload[0] >> 7
    if pictures != 1:
        raise ChunkFormatError(f"an HEVC frame of {pictures} pictures instead of one")


def _nal_units(data: Data) -> list[tuple[int, int, memoryview]]:
    """(nal_unit_type, nuh_layer_id, payload with its emulation prevention) of every unit (7.3.1.2)."""
    view = memoryview(data)
    edges = [match.start() for match in _START_CODE.finditer(view)] + [len(view)]
    units = []
    for edge, end in itertools.pairwise(edges):
        start = edge + _START_CODE_BYTES
        if end - start < _NAL_HEADER_BYTES:
            raise ChunkFormatError("an HEVC unit without a header")
        header = int.from_bytes(view[start : start + _NAL_HEADER_BYTES], "big")
        units.append((header >> 9 & 0x3F, header >> 3 & 0x3F, view[start + _NAL_HEADER_BYTES : end]))
    return units


def _gray_picture_size(sps: memoryview) -> tuple[int, int]:
    """pic_width_in_luma_samples and pic_height_in_luma_samples of a sequence parameter set (7.3.2.2.1)."""
    bits = _Bits(bytes(sps[:_SPS_BYTES_READ]).replace(b"\0\0\3", b"\0\0"))
    bits.take(4)  # sps_video_parameter_set_id
    if bits.take(3):  # sps_max_sub_layers_minus1
        raise ChunkFormatError("an HEVC picture in several temporal layers is not a frame")
    bits.take(1)  # sps_temporal_id_nesting_flag
    bits.take(88 + 8)  # profile_tier_level: general profile and level (7.3.3)
    bits.take_golomb()  # sps_seq_parameter_set_id
    if bits.take_golomb() != 0:  # chroma_format_idc
        raise ChunkFormatError("an HEVC picture in colour is not a frame")
    return bits.take_golomb(), bits.take_golomb()


class _Bits:
    """Reads from the most significant bit on. Raises ChunkFormatError past the end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def take(self, count: int) -> int:
        if count > self._left:
            raise ChunkFormatError("an HEVC parameter set ends too early")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def take_golomb(self) -> int:
        """ue(v), 9.2"""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
