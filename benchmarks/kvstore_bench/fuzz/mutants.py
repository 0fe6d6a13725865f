"""Makes mutants: chunks that a hostile writer has damaged on purpose, with correct checksums around the damage."""

import dataclasses
import functools
import random
import struct
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash

from kvstore_bench.fuzz.edits import edit_bytes, edit_number, edit_video, flip, has_video
from kvstore_bench.fuzz.seeds import TENANTS, Seed, seeds
from kvstore_codec.chunk import FIXED_PREFIX_BYTES, MAGIC, VERSION
from kvstore_codec.encoding import Encoding
from kvstore_codec.payload import OPENING_BYTES

_CHECKSUM_BYTES = 8
_VIDEO_SHARE = 0.2
_EXTREMES: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    63,
    64,
    65,
    255,
    256,
    1024,
    2**16,
    2**31,
    2**32 - 1,
    2**63,
    None,
    "x",
    b"",
    [],
)


class Kind(StrEnum):
    """Kind of damage. All kinds but RAW have correct checksums of the header and the frames."""

    RAW = "raw"
    """Any bytes of the chunk, as by a failing disk. No checksum is corrected."""
    HEADER_FIELD = "header-field"
    """One field of the header."""
    HEADER_BYTES = "header-bytes"
    """Any bytes of the encoded header."""
    FRAME = "frame"
    """Any bytes of a frame, including its sample checksum."""
    SAMPLES = "samples"
    """Bytes after the sample checksum. The checksum is still that of the undamaged frame."""
    NUMBERS = "numbers"
    """Lengths, counts, steps and tilings inside a frame."""
    VIDEO = "video"
    """NAL units of an HEVC stream."""
    SPLICE = "splice"
    """A frame, or the end of one, is replaced by that of another tenant or another encoding."""
    RESIGNED = "resigned"
    """Re-signed: damaged as VIDEO or SAMPLES, but the sample checksum is that of what the damaged frame decodes to."""


_WEIGHTS = {
    Kind.RAW: 4,
    Kind.HEADER_FIELD: 10,
    Kind.HEADER_BYTES: 8,
    Kind.FRAME: 12,
    Kind.SAMPLES: 22,
    Kind.NUMBERS: 14,
    Kind.SPLICE: 10,
    Kind.RESIGNED: 20,
}
_VIDEO_WEIGHTS = {
    Kind.FRAME: 10,
    Kind.SAMPLES: 10,
    Kind.NUMBERS: 8,
    Kind.VIDEO: 40,
    Kind.SPLICE: 10,
    Kind.RESIGNED: 22,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """A damaged chunk. `data` is the whole chunk, `frame` the index of its damaged frame. If `kind` is RESIGNED, the
    sample checksum of that frame is still to be replaced (`resigned`)."""

    number: int
    kind: Kind
    seed: Seed
    data: bytes
    frame: int


def mutant(run_seed: int, number: int, coder: str = "") -> Mutant:
    """Makes a mutant, of a chunk in an encoding of this coder if one is given. It depends only on the arguments, not on
    earlier calls."""
    rng = random.Random(f"{run_seed}:{number}")
    video, other_seeds = _by_kind(coder)
    wants_video = bool(video) and (not other_seeds or rng.random() < _VIDEO_SHARE)
    seed = rng.choice(video if wants_video else other_seeds)
    weights = _VIDEO_WEIGHTS if wants_video else _WEIGHTS
    kind = rng.choices(list(weights), list(weights.values()))[0]
    frame = rng.randrange(len(seed.frames))
    if kind is Kind.RAW:
        data = bytearray(seed.data)
        edit_bytes(rng, data)
        return Mutant(number, kind, seed, bytes(data), frame)
    fields = _fields(seed)
    if kind is Kind.HEADER_BYTES:
        body = bytearray(_body(seed))
        edit_bytes(rng, body)
        return Mutant(number, kind, seed, b"".join((_sealed(bytes(body)), *seed.frames)), frame)
    frames = list(seed.frames)
    if kind is Kind.HEADER_FIELD:
        _edit_field(rng, fields)
        return Mutant(number, kind, seed, b"".join((_sealed(msgpack.packb(fields)), *frames)), frame)
    frames[frame] = _edited(rng, kind, seed, frames, frame)
    return Mutant(number, kind, seed, repaired(fields, frames), frame)


def repaired(fields: dict[str, Any], frames: Sequence[bytes]) -> bytes:
    """The chunk with these header fields and frames. Its lengths and checksums are correct."""
    fields = fields | {
        "lengths": np.array([len(frame) for frame in frames], "<u4").tobytes(),
        "checksums": np.array([xxhash.xxh3_64_intdigest(frame) for frame in frames], "<u8").tobytes(),
    }
    return b"".join((_sealed(msgpack.packb(fields)), *frames))


def resigned(found: Mutant, checksum: int) -> Mutant:
    """The mutant with another sample checksum in its damaged frame."""
    offset = len(found.data) - sum(_frame_lengths(found)[found.frame :])
    length = _frame_lengths(found)[found.frame]
    body = found.data[offset : offset + length]
    frames = list(found.seed.frames)
    frames[found.frame] = body[:1] + struct.pack("<Q", checksum) + body[OPENING_BYTES:]
    return dataclasses.replace(found, data=repaired(_fields(found.seed), frames))


def _frame_lengths(found: Mutant) -> list[int]:
    """Sizes of the frames of a mutant with a valid header, bytes."""
    total = int(struct.unpack_from("<I", found.data, 6)[0])
    fields = msgpack.unpackb(found.data[FIXED_PREFIX_BYTES : FIXED_PREFIX_BYTES + total])
    lengths: list[int] = np.frombuffer(fields["lengths"], "<u4").tolist()
    return lengths


def _edited(rng: random.Random, kind: Kind, seed: Seed, frames: Sequence[bytes], frame: int) -> bytes:
    data = bytearray(frames[frame])
    match kind:
        case Kind.FRAME:
            edit_bytes(rng, data)
        case Kind.NUMBERS:
            for _ in range(rng.randint(1, 3)):
                edit_number(rng, data, OPENING_BYTES)
        case Kind.VIDEO:
            edit_video(rng, data, rng.choice(_other(rng, seed).frames))
        case Kind.SPLICE:
            foreign = rng.choice(_other(rng, seed).frames)
            # Replace the whole frame, all after the sample checksum, or the end.
            first = rng.choice((0, OPENING_BYTES, rng.randrange(len(data))))
            data[first:] = foreign[first:]
        case Kind.RESIGNED if has_video(bytes(data)) and rng.random() < 0.8:
            edit_video(rng, data, rng.choice(_other(rng, seed).frames))
        case _:
            if rng.random() < 0.5:
                flip(rng, data, OPENING_BYTES)
            else:
                edit_bytes(rng, data, OPENING_BYTES)
    return bytes(data)


def _other(rng: random.Random, seed: Seed) -> Seed:
    """Chooses the seed of another tenant in the same encoding, or any seed."""
    alike = [other for other in seeds() if other.name == seed.name and other.tenant != seed.tenant]
    return rng.choice(alike if TENANTS > 1 and rng.random() < 0.7 else seeds())


@functools.cache
def _by_kind(coder: str) -> tuple[list[Seed], list[Seed]]:
    """The seeds with a video encoding, and all others. Those of one coder and its variants only, if one is given."""
    found = [seed for seed in seeds() if seed.header.encoding.coder.startswith(coder)]
    video = [seed for seed in found if seed.header.encoding.is_video]
    return video, [seed for seed in found if not seed.header.encoding.is_video]


def _edit_field(rng: random.Random, fields: dict[str, Any]) -> None:
    name = rng.choice(
        [*fields, "geometry", "geometry", "geometry", "encoding", "lengths", "calibration", "more"]
    )
    match name:
        case "geometry":
            geometry = list(fields["geometry"])
            for _ in range(rng.randint(1, 2)):
                place = rng.randrange(len(geometry))
                geometry[place] = rng.choice((*_EXTREMES, "float16", "float32", "bfloat16"))
            fields["geometry"] = geometry if rng.random() < 0.9 else geometry[: rng.randrange(8)]
        case "encoding":
            fields["encoding"] = rng.choice((*Encoding.names(), "low-zstd@20", "step1e9-zstd", "", 7, None))
        case "lengths" | "checksums" | "model" | "content" | "prefix" | "token_order":
            value = fields.get(name, b"")
            edited = bytearray(value if isinstance(value, bytes) else rng.randbytes(8))
            edit_bytes(rng, edited)
            fields[name] = rng.choice((bytes(edited), [bytes(edited)] * 2, None))
        case "calibration":
            fields["calibration"] = rng.choice((rng.randbytes(32), b"", None, 7))
        case _:
            fields[name] = rng.choice(_EXTREMES)


def _fields(seed: Seed) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(_body(seed))
    return fields


def _body(seed: Seed) -> bytes:
    """The encoded fields of the header, without prefix and checksum."""
    return seed.header_data[FIXED_PREFIX_BYTES:-_CHECKSUM_BYTES]


def _sealed(body: bytes) -> bytes:
    """The header with these encoded fields, with prefix and checksum."""
    signed = struct.pack("<4sHI", MAGIC, VERSION, len(body)) + body
    return signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed))
