"""Random edits of one frame: of its bytes, of its numbers, or of its HEVC stream."""

import itertools
import random
import struct
from collections.abc import Callable, Sequence

from kvstore_codec.coders.hevc.bitstream import PARAMETER_SETS, Unit, nal_units
from kvstore_codec.errors import ChunkFormatError

# Start code and header of a video parameter set. Every stream begins with them.
_STREAM_START = b"\0\0\1\x40\1"
_EXTREME_U32 = (0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
_EXTREME_F32 = (0.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))


def flip(rng: random.Random, data: bytearray, first: int = 0) -> None:
    """Flips one bit at or after offset `first`."""
    if len(data) > first:
        data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)


def edit_bytes(rng: random.Random, data: bytearray, first: int = 0) -> None:
    """Makes one to four edits at or after offset `first`. An edit changes, removes, inserts or repeats bytes."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(first, max(first + 1, len(data)))
        length = rng.randint(1, 8)
        match rng.randrange(8):
            case 0 | 1:
                flip(rng, data, first)
            case 2:
                data[at : at + length] = rng.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = rng.randbytes(length)
            case 5:
                del data[at:]
            case 6:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case 7:
                data[at:] = bytes(len(data) - at)


def edit_number(rng: random.Random, data: bytearray, first: int = 0) -> None:
    """Writes an extreme number into the first 48 bytes from offset `first`, where lengths, counts, steps and tilings
    are stored."""
    if len(data) <= first:
        return
    at = min(first + rng.randrange(48), len(data) - 1)
    match rng.randrange(3):
        case 0:
            number = struct.pack("<I", rng.choice((*_EXTREME_U32, len(data))))
        case 1:
            number = struct.pack("<H", rng.choice(_EXTREME_U32[:7]))
        case 2:
            number = struct.pack("<f", rng.choice(_EXTREME_F32))
    data[at : at + len(number)] = number


def has_video(frame: bytes) -> bool:
    """Whether the frame contains an HEVC stream."""
    return _STREAM_START in frame


def edit_video(rng: random.Random, frame: bytearray, other: bytes) -> None:
    """Makes one to three edits of the HEVC stream in `frame`. Some insert NAL units of the frame `other`."""
    start = _stream_start(frame)
    units = _units(bytes(frame[start:]))
    for _ in range(rng.randint(1, 3)):
        _VIDEO_EDITS[rng.randrange(len(_VIDEO_EDITS))](rng, units, other)
    frame[start:] = b"".join(units)


def _flip_in_slice(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    slices = [unit for unit in units if not _is_parameter_set(unit)]
    if slices:
        # A slice has flags and then entropy-coded data. Any entropy-coded data decodes to some picture.
        flip(rng, rng.choice(slices), rng.choice((5, 5, 12)))


def _edit_parameter_set(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    sets = [unit for unit in units if _is_parameter_set(unit)]
    if sets:
        flip(rng, rng.choice(sets), rng.choice((3, 5)))


def _end_early(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    unit = units[rng.randrange(len(units))]
    at = rng.randrange(len(unit) + 1)
    if rng.random() < 0.5:
        del unit[at:]
    else:
        unit[at:] = bytes(len(unit) - at)


def _drop(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    if len(units) > 1:
        del units[rng.randrange(len(units))]


def _repeat(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    units.insert(rng.randint(0, len(units)), bytearray(rng.choice(units)))


def _swap(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    one, other = rng.randrange(len(units)), rng.randrange(len(units))
    units[one], units[other] = units[other], units[one]


def _take_from_other(rng: random.Random, units: list[bytearray], other: bytes) -> None:
    if has_video(other):
        foreign = _units(other[_stream_start(other) :])
        units[rng.randrange(len(units))] = rng.choice(foreign)


def _rename(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    """Changes the type of a unit, or its layer."""
    unit = units[rng.randrange(len(units))]
    if len(unit) > 4:
        unit[rng.choice((3, 4))] = rng.randrange(256)


def _edit_unit(rng: random.Random, units: list[bytearray], _: bytes) -> None:
    edit_bytes(rng, units[rng.randrange(len(units))])


_Edit = Callable[[random.Random, list[bytearray], bytes], None]
_VIDEO_EDITS: Sequence[_Edit] = (
    _flip_in_slice,
    _flip_in_slice,
    _flip_in_slice,
    _edit_parameter_set,
    _end_early,
    _end_early,
    _drop,
    _repeat,
    _swap,
    _take_from_other,
    _rename,
    _edit_unit,
)


def _stream_start(frame: bytes | bytearray) -> int:
    return frame.index(_STREAM_START)


def _units(stream: bytes) -> list[bytearray]:
    """The NAL units of the stream, each with its start code. At least one."""
    try:
        found: list[Unit] = list(nal_units(stream))
    except ChunkFormatError:  # the stream ends within a start code
        return [bytearray(stream)]
    starts = [unit.start for unit in found] + [len(stream)]
    return [bytearray(stream[start:end]) for start, end in itertools.pairwise(starts)]


def _is_parameter_set(unit: bytearray) -> bool:
    return len(unit) > 3 and (unit[3] >> 1 & 0x3F) in PARAMETER_SETS
