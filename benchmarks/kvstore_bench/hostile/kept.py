"""Parsers of what clients and tools keep or receive: matches, events, measurements, credentials, and traces."""

import functools
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import xxhash

from kvstore_api.kv_events import Event, Removed, Stored, decode_batch, encode_batch
from kvstore_api.placement import Member
from kvstore_bench.fuzz.edits import edit_bytes
from kvstore_bench.hostile.folder import folder
from kvstore_bench.hostile.parser import IgnoredError, Parser, WrongResultError
from kvstore_bench.hostile.values import JSON, MSGPACK, edit_value, mutated_document
from kvstore_bench.shaping import jitter
from kvstore_bench.trace.trace import read_trace
from kvstore_client.kv_events import StoredBlocks
from kvstore_client.match import MAX_MATCH_BYTES, Match, StoredChunk, Variant
from kvstore_client.planning.losses import LossTable, PartLosses
from kvstore_client.planning.profile import CodecCost, PrefillCost, Profile, ProfileStore
from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import Measurement, Tuned
from kvstore_client.replicas import Lease
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ConfigurationError, MatchFormatError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from kvstore_service.identity.document import read_document

_SPEC = ModelSpec("synthetic", bytes(32), 4, 2, 16, KVDtype.BFLOAT16, RopeSpec("default", 1e4, 16))
_MOST_MUTANT_BYTES = 1 << 20
_KEY = "0" * 64
_TRACE = b'{"timestamp": 27, "hash_ids": [46, 47, 3]}\n{"timestamp": 31.5, "hash_ids": [46]}\n'
_LINK = b"0 1e9\n0.5 2e8\n2 1e9 # comment\n"


def parsers() -> list[Parser]:
    refused = (ConfigurationError,)
    return [
        Parser("match", _matches, _match_mutant, _read_match, (MatchFormatError,)),
        Parser("kv-events", _batches, _batch_mutant, _read_batch, (ValueError,)),
        _kept("profile", _save_profile, _load_profile),
        _kept("losses", _save_losses, _load_losses),
        _kept("ratios", _save_ratios, _load_ratios),
        Parser("credentials", _credentials, _mutant_of(_credentials), _read_credentials, refused),
        Parser("trace", lambda: (_TRACE, _TRACE * 3000, _wide_trace()), _trace_mutant, _read_trace, refused),
        Parser("link-trace", lambda: (_LINK, _link(5000)), _link_mutant, _read_link, refused),
    ]


def _mutant_of(honest: Callable[[], Sequence[bytes]]) -> Callable[[random.Random], bytes]:
    """Edits the JSON document that comes first."""
    return lambda rng: mutated_document(rng, JSON, json.loads(honest()[0]), _MOST_MUTANT_BYTES)


@functools.cache
def _matches() -> Sequence[bytes]:
    return (_match(2), _match(2000))


def _match(chunks: int) -> bytes:
    member = Member("node", "10.0.0.1:7", 1.0, "10.0.0.1:8", "rack")
    stored = []
    for number in range(chunks):
        name = ChunkId(ContentId(number.to_bytes(32, "big")), PrefixId(b"\1" * 32))
        geometry = Geometry.of(_SPEC)
        header, data = write_header(
            _SPEC.digest, name, Encoding.parse("exact-raw"), geometry, [bytes(8)] * geometry.frame_count
        )
        stored.append(StoredChunk(name, (Variant(header, data),), member, number * 256))
    lease = Lease(member, bytes(16), list(range(chunks)), b"\3", 256 * chunks)
    return Match(tuple(stored), (lease,)).to_bytes()


def _match_mutant(rng: random.Random) -> bytes:
    """Edits the values of a match, or the header of a chunk in it."""
    data = _matches()[0]
    unpacker = msgpack.Unpacker()
    unpacker.feed(data[6:-8])
    values = edit_value(rng, list(unpacker), (b"\xff" * 32, 2**31 - 1, 2**63 - 1))
    packed = bytearray(b"".join(map(msgpack.packb, values)))
    if rng.random() < 0.2:
        edit_bytes(rng, packed)
    if rng.random() < 0.002:  # as many values as fit
        packed += rng.choice((b"\0", b"\xc4\0", b"\0\xc4\0\xc4\0\xc4\0\0")) * (_MOST_MUTANT_BYTES // 8)
    signed = data[:6] + packed[: MAX_MATCH_BYTES - 14]
    return signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed))


def _read_match(data: bytes) -> None:
    match = Match.from_bytes(data, _SPEC, lambda _: None)
    if Match.from_bytes(match.to_bytes(), _SPEC, lambda _: None) != match:
        raise WrongResultError("a match that differs when it is written and read again")


@functools.cache
def _batches() -> Sequence[bytes]:
    blocks = [bytes([number]) * 32 for number in range(3)]
    many = [number.to_bytes(32, "big") for number in range(25_000)]
    events: list[Event] = [Stored(blocks, "CPU"), Removed(blocks[:1], "STORAGE")]
    return (encode_batch(1e9, events), encode_batch(1e9, [Stored(many, "CPU")]))


def _batch_mutant(rng: random.Random) -> bytes:
    return mutated_document(rng, MSGPACK, msgpack.unpackb(_batches()[0]), _MOST_MUTANT_BYTES)


def _read_batch(data: bytes) -> None:
    time_unix_s, events = decode_batch(data)
    blocks = StoredBlocks()
    blocks.apply(events)
    if not math.isfinite(time_unix_s):
        raise WrongResultError(f"a time of {time_unix_s}")


def _kept(name: str, save: Callable[[Path], Path], load: Callable[[Path], Any]) -> Parser:
    """The parser of a file in the cache folder, which `save` writes, and of which `load` returns what it says, or None
    if it is unusable."""

    @functools.cache
    def honest() -> Sequence[bytes]:
        return (save(folder()).read_bytes(),)

    def read(data: bytes) -> None:
        honest()
        save(folder()).write_bytes(data)
        if load(folder()) is None:
            raise IgnoredError

    return Parser(name, honest, _mutant_of(honest), read, (IgnoredError,))


def _save_profile(cache: Path) -> Path:
    codecs = {"exact-raw": CodecCost(1e-4, 1e-5), "high-zstd": CodecCost(1e-4, 1e-5)}
    profile = Profile(codecs, PrefillCost(0.01, 1e-4, 1e-8), 0.5, 2, {"model": "synthetic"})
    ProfileStore(cache).save(_KEY, profile)
    return cache / "profiles" / f"{_KEY}.json"


def _load_profile(cache: Path) -> Profile | None:
    profile = ProfileStore(cache).load(_KEY)
    if profile is not None:
        profile.codec("low-zstd")
        if not 0 <= profile.prefill.seconds(1000, 1000) < float("inf") or profile.decode_threads > 1 << 16:
            raise WrongResultError(f"an absurd profile: {profile}"[:200])
    return profile


def _save_losses(cache: Path) -> Path:
    table = LossTable(cache)
    table.save(bytes(32), PartLosses.of([(0.1, 0.5), (0.3, 0.2)]), {"model": "synthetic"})
    return table.path(bytes(32))


def _load_losses(cache: Path) -> PartLosses | None:
    losses = LossTable(cache).load(bytes(32))
    losses.at(0.5)
    return losses if losses.shares else None


def _save_ratios(cache: Path) -> Path:
    ratios = TunedRatios(cache)
    ratios.save(bytes(32), "disk", Tuned(0.3, (Measurement(0.1, 2.0), Measurement(0.3, 1.0))))
    return ratios.path(bytes(32))


def _load_ratios(cache: Path) -> Any:
    return TunedRatios(cache).load(bytes(32)) or None


@functools.cache
def _credentials() -> Sequence[bytes]:
    entry = {
        "id": "5f3a" * 4,
        "name": "worker",
        "tenant": "acme",
        "scopes": ["data"],
        "created": "2026-07-01T12:00:00Z",
        "expires": "2026-10-01T12:00:00Z",
        "token_sha256": "9b" * 32,
    }
    head = {"format": "kvstore-credentials", "version": 1}
    return [json.dumps({**head, "credentials": [entry] * count}).encode() for count in (2, 3000)]


def _read_credentials(data: bytes) -> None:
    for credential in read_document(data.decode(errors="replace")):
        if not credential.scopes:
            raise WrongResultError("a credential without a scope")


def _trace_mutant(rng: random.Random) -> bytes:
    line = mutated_document(rng, JSON, json.loads(_TRACE.splitlines()[0]), _MOST_MUTANT_BYTES // 2)
    lines = [line, *_TRACE.splitlines()]
    rng.shuffle(lines)
    return b"\n".join(lines)


def _wide_trace() -> bytes:
    """One request of as many blocks as fit."""
    return b'{"timestamp": 1.5, "hash_ids": [%s]}' % b", ".join(
        b"%d" % n for n in range(_MOST_MUTANT_BYTES // 8)
    )


def _read_trace(data: bytes) -> None:
    path = folder() / "trace.jsonl"
    path.write_bytes(data)
    if not read_trace(path).footprint():
        raise WrongResultError("a trace without blocks")


def _link(lines: int) -> bytes:
    return b"".join(b"%d %d\n" % (number, 1000 + number) for number in range(lines))


def _link_mutant(rng: random.Random) -> bytes:
    words = _LINK.split(b" ")
    for _ in range(rng.choice((1, 2))):
        number = rng.choice(
            (b"0", b"-1", b"1e308", b"-1e308", b"5e-324", b"inf", b"nan", b"1_0", b"9" * 5000, b"", b"\n")
        )
        words[rng.randrange(len(words))] = number
    data = bytearray(b" ".join(words))
    if rng.random() < 0.5:
        edit_bytes(rng, data)
    return bytes(data)


def _read_link(data: bytes) -> None:
    path = folder() / "link.txt"
    path.write_bytes(data)
    pattern = jitter.read_trace(path)
    if not 0 < pattern.full_bps < float("inf") or not 0 < pattern.recorded.period_s < float("inf"):
        raise WrongResultError(f"a link of {pattern.full_bps} bit/s")
    pattern.schedule(1e9).bandwidth_bps(7.7)
