"""What decoding mutants shows. A batch is decoded forwards and then backwards, into tensors filled differently, with
sound chunks in between: what comes from anywhere but a mutant's own bytes differs from one time to the other."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import xxhash

from kvstore_bench.fuzz.mutants import Kind, Mutant, mutant, resigned
from kvstore_bench.fuzz.seeds import Seed, decoder_of, seeds
from kvstore_codec.chunk import verify_chunk
from kvstore_codec.codec import decode_frames
from kvstore_codec.errors import KVStoreError, SampleMismatchError

BATCH = 32
# A client decodes chunks of its model's shape only; here a mutant may claim any shape up to so many values. The largest
# seeds have 16,384.
_MOST_VALUES = 1 << 16
_FORWARDS, _BACKWARDS = -7.0, 11.0


class Verdict(StrEnum):
    REFUSED = "refused"
    """with one of the project's own errors, both times"""
    SOUND = "sound"
    """the KV of the seed, both times: the mutation is without effect"""
    OTHER = "other KV"
    """KV that was not the seed's, the same both times: what every decoder makes of that chunk"""
    UNSTEADY = "refused once"
    DIFFERENT = "decoded differently"
    """two times decoded, to different KV"""
    FOREIGN = "foreign exception"


@dataclass(frozen=True, slots=True)
class Judgement:
    mutant: Mutant
    verdict: Verdict
    detail: str
    """the error, or what differed"""
    slowest_s: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """`kv` is a digest of the decoded tensors; None where `refusal` says why there are none."""

    kv: int | None
    refusal: str
    foreign: bool
    seconds: float


def judge_batch(run_seed: int, batch: int, begins: Callable[[int], None]) -> list[Judgement]:
    """Of the mutants from `batch * BATCH` on; `begins` is told the number of each that is decoded next."""
    found: list[Mutant] = []
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        begins(number)
        found.append(_signed_by_its_writer(mutant(run_seed, number)))
    forwards = [_observed(each, _FORWARDS, begins) for each in found]
    _check_sound_chunks(found[-1].seed, batch)
    backwards = [_observed(each, _BACKWARDS, begins) for each in reversed(found)]
    return [
        _judgement(each, first, second)
        for each, first, second in zip(found, forwards, reversed(backwards), strict=True)
    ]


def check_seeds() -> None:
    """Decode every seed once. Raises AssertionError for one that does not decode to what it did the first time."""
    for seed in seeds():
        _require_sound(seed)


def _judgement(found: Mutant, first: _Outcome, second: _Outcome) -> Judgement:
    detail = first.refusal or second.refusal
    if first.foreign or second.foreign:
        verdict = Verdict.FOREIGN
    elif first.kv is None and second.kv is None:
        verdict = Verdict.REFUSED
    elif first.kv is None or second.kv is None:
        verdict = Verdict.UNSTEADY
    elif first.kv != second.kv:
        verdict, detail = Verdict.DIFFERENT, f"{first.kv:016x}, {second.kv:016x}"
    else:
        verdict = Verdict.SOUND if first.kv == _expected(found.seed) else Verdict.OTHER
    return Judgement(found, verdict, detail, max(first.seconds, second.seconds))


def _observed(found: Mutant, fill: float, begins: Callable[[int], None]) -> _Outcome:
    begins(found.number)
    return _outcome(found.data, fill)


def _outcome(data: bytes, fill: float) -> _Outcome:
    started_s = time.perf_counter()
    kv, refusal, foreign = None, "", False
    try:
        kv = _decoded(data, fill)
    except KVStoreError as error:
        refusal = type(error).__name__
    except Exception as error:  # any other is what is looked for
        refusal, foreign = f"{type(error).__name__}: {error}"[:200], True
    return _Outcome(kv, refusal, foreign, time.perf_counter() - started_s)


class _TooLargeError(KVStoreError):
    """More KV than a client of the seeds' model would make room for."""


def _decoded(data: bytes, fill: float) -> int:
    """A digest of the chunk's KV, decoded into tensors filled with `fill`."""
    header = verify_chunk(data, len(data))
    geometry = header.geometry
    shape = geometry.layers, geometry.kv_heads, geometry.tokens, geometry.head_dim
    if 2 * geometry.layers * geometry.kv_heads * geometry.tokens * geometry.head_dim > _MOST_VALUES:
        raise _TooLargeError(f"KV of shape {shape}")
    keys, values = (torch.full(shape, fill, dtype=geometry.dtype.torch) for _ in range(2))
    decoder = decoder_of(header)
    count = geometry.frames_per_period
    for period in range(geometry.periods):
        first, layers = period * count, geometry.layers_of(period)
        offset, length = header.range_bytes(first, count)
        places = slice(layers.start, layers.stop)
        frames = memoryview(data)[offset : offset + length]
        decode_frames(header, first, count, frames, keys[places], values[places], **decoder)
    return _digest((keys, values))


def _digest(tensors: Sequence[torch.Tensor]) -> int:
    hasher = xxhash.xxh3_64()
    for tensor in tensors:
        hasher.update(tensor.view(torch.uint8).numpy().data)
    return int(hasher.intdigest())


def _check_sound_chunks(seed: Seed, turn: int) -> None:
    """Decode the chunk of another tenant in this seed's encoding, and two others: decoders work on after mutants, and
    have traces of other tenants in all their memory."""
    neighbour = next(other for other in seeds() if other.name == seed.name and other.tenant != seed.tenant)
    for each in (neighbour, seeds()[turn % len(seeds())], seeds()[-1 - turn % 10]):
        _require_sound(each)


def _require_sound(seed: Seed) -> None:
    if _outcome(seed.data, 0.0).kv != _expected(seed):
        raise AssertionError(f"a sound chunk of {seed.name} does not decode to its KV any more")


_EXPECTED: dict[tuple[str, int], int] = {}


def _expected(seed: Seed) -> int:
    """What it decoded to when it was first decoded."""
    key = seed.name, seed.tenant
    if key not in _EXPECTED:
        _EXPECTED[key] = _decoded(seed.data, 0.0)
    return _EXPECTED[key]


def _signed_by_its_writer(found: Mutant) -> Mutant:
    """A RESIGNED mutant with the checksum of what its writer's decoder makes of it; unchanged where that refuses it."""
    if found.kind is not Kind.RESIGNED:
        return found
    try:
        _decoded(found.data, 0.0)
    except SampleMismatchError as error:
        return resigned(found, error.found)
    except KVStoreError:
        return found
    return found
