"""Decodes mutants and judges the results.

A batch is decoded in order, then valid chunks, and then the batch in reverse order, each time into tensors with other
initial values. A decoder that uses anything but the mutant's own bytes then returns different KV the second time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import xxhash

from kvstore_bench.fuzz.mutants import Kind, Mutant, mutant, resigned
from kvstore_bench.fuzz.seeds import Seed, decoder_of, seeds
from kvstore_codec.codec import decode_frames
from kvstore_codec.errors import KVStoreError, SampleMismatchError
from kvstore_codec.whole_chunk import verify_chunk

BATCH = 32
# Largest KV that is decoded, in values. The largest seeds have 16,384. A client has no such limit, because it decodes
# only chunks of its model's shape.
_MOST_VALUES = 1 << 16
_FORWARDS, _BACKWARDS = -7.0, 11.0


class Verdict(StrEnum):
    REFUSED = "refused"
    """Raised one of the project's own errors, both times."""
    SOUND = "sound"
    """Decoded to the KV of the seed, both times: the mutation has no effect."""
    OTHER = "other KV"
    """Decoded to other KV than the seed's, the same both times."""
    UNSTEADY = "refused once"
    """Raised one of the project's own errors, but only once."""
    DIFFERENT = "decoded differently"
    """Decoded both times, to different KV."""
    FOREIGN = "foreign exception"
    """Raised an exception that is not the project's own."""


@dataclass(frozen=True, slots=True)
class Judgement:
    mutant: Mutant
    verdict: Verdict
    detail: str
    """The error, or the two digests of different KV."""
    slowest_s: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Result of one decoding. `kv` is a digest of the decoded tensors, or None when decoding raised `refusal`."""

    kv: int | None
    refusal: str
    foreign: bool
    seconds: float


def judge_batch(run_seed: int, batch: int, begins: Callable[[int], None]) -> list[Judgement]:
    """Judges the mutants from number `batch * BATCH` on. Calls `begins` with a mutant's number before decoding it."""
    found: list[Mutant] = []
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        begins(number)
        found.append(with_writers_checksum(mutant(run_seed, number)))
    forwards = [_observed(each, _FORWARDS, begins) for each in found]
    _check_valid_chunks(found[-1].seed, batch)
    backwards = [_observed(each, _BACKWARDS, begins) for each in reversed(found)]
    return [
        _judgement(each, first, second)
        for each, first, second in zip(found, forwards, reversed(backwards), strict=True)
    ]


def check_seeds() -> None:
    """Decodes every seed. Raises AssertionError for a seed that decodes to other KV than the first time."""
    for seed in seeds():
        _require_valid(seed)


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
        kv = decoded(data, fill)
    except KVStoreError as error:
        refusal = type(error).__name__
    except Exception as error:  # what the fuzzer looks for
        refusal, foreign = f"{type(error).__name__}: {error}"[:200], True
    return _Outcome(kv, refusal, foreign, time.perf_counter() - started_s)


class _TooLargeError(KVStoreError):
    """The chunk claims more than `_MOST_VALUES` values."""


def decoded(data: bytes, fill: float) -> int:
    """Decodes the chunk into tensors filled with `fill`. Returns a digest of its KV."""
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


def _check_valid_chunks(seed: Seed, turn: int) -> None:
    """Decodes another tenant's chunk in this seed's encoding, and two others. Raises AssertionError when decoding the
    mutants has changed the result. Also leaves KV of other tenants in the decoders' memory."""
    neighbour = next(other for other in seeds() if other.name == seed.name and other.tenant != seed.tenant)
    for each in (neighbour, seeds()[turn % len(seeds())], seeds()[-1 - turn % 10]):
        _require_valid(each)


def _require_valid(seed: Seed) -> None:
    if _outcome(seed.data, 0.0).kv != _expected(seed):
        raise AssertionError(f"a valid chunk of {seed.name} no longer decodes to its KV")


_EXPECTED: dict[tuple[str, int], int] = {}


def _expected(seed: Seed) -> int:
    """Digest of the KV that the seed decoded to the first time."""
    key = seed.name, seed.tenant
    if key not in _EXPECTED:
        _EXPECTED[key] = decoded(seed.data, 0.0)
    return _EXPECTED[key]


def with_writers_checksum(found: Mutant) -> Mutant:
    """Replaces the sample checksum of a RESIGNED mutant by the checksum of the samples it decodes to. Returns any other
    mutant, and one that cannot be decoded, unchanged."""
    if found.kind is not Kind.RESIGNED:
        return found
    try:
        decoded(found.data, 0.0)
    except SampleMismatchError as error:
        return resigned(found, error.found)
    except KVStoreError:
        return found
    return found
