"""What a lookup found: the stored chunks of a prompt, the nodes that hold them, and the leases on them.

A match may be found in one process and fetched in another, as in engines whose scheduler runs in a process of its own.
`Match.to_bytes` writes

    magic "KVM\\0" | version u16 | msgpack values, none of which holds others | xxh3_64 of all that, u64

The values are counts, names and the headers of chunks as their nodes sent them. There are no tensors: a calibration
travels by its digest, and the receiving process uses the one that it has itself. A reader allocates memory in
proportion to the bytes that are there, and never recurses.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash

from kvstore_api.placement import Member
from kvstore_client.replicas import Lease
from kvstore_codec.chunk import MAX_HEADER_BYTES, ChunkHeader, read_header
from kvstore_codec.errors import CodecError, MatchFormatError
from kvstore_codec.identity import ChunkId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec

MAX_MATCH_BYTES = 16 << 20
"""A chunk takes up to 2 KiB with three encodings: enough for two million tokens."""
_MAX_TEXT_BYTES = 4096
_MAX_CALIBRATIONS = 16
"""Each one that is not here yet is loaded by a thread."""
_MAX_NUMBER = (1 << 31) - 1
_PREFIX = struct.Struct("<4sH")
_MAGIC, _VERSION = b"KVM\0", 1
_CHECKSUM = struct.Struct("<Q")
_INDEX_DTYPE = np.dtype("<u4")

Value = TypeVar("Value", bool, int, float, str, bytes)


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the encodings that a chunk is stored in."""

    header: ChunkHeader
    header_data: bytes = field(repr=False)
    """The bytes of `header`, as the node sent them."""
    klt: KLT | None = None
    """The calibration that its header names, if it names one. None also where that is not at hand: such a variant
    cannot be decoded."""
    on_disk: bool = False
    """Whether its node has it on disk only."""

    @property
    def is_decodable(self) -> bool:
        return self.klt is not None or self.header.calibration is None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of the prompt that is stored: what its headers say, and who holds it."""

    chunk_id: ChunkId
    """As it is stored, which is how it is read."""
    variants: tuple[Variant, ...]
    """Those that can be used now, one at least: the most faithful first, and of equally faithful ones in the order of
    `EncodingSettings.accept`."""
    member: Member
    first_token: int
    """Position in the prompt of the chunk's first token."""
    exact: bool = True
    """Whether it is stored in the context that it has in the prompt. Otherwise the KV is that of the same tokens behind
    another text, and only approximately what the prompt's would be."""

    @property
    def header(self) -> ChunkHeader:
        return self.variants[0].header

    @property
    def klt(self) -> KLT | None:
        return self.variants[0].klt

    @property
    def on_disk(self) -> bool:
        return self.variants[0].on_disk

    @property
    def body_bytes(self) -> int:
        """Total size of all frames of its first variant."""
        return self.header.size_bytes - self.header.header_bytes


@dataclass(frozen=True, slots=True)
class Match:
    """The chunks of a prompt that are to be reused, in order of position, leased until released."""

    chunks: tuple[StoredChunk, ...] = ()
    leases: tuple[Lease, ...] = ()
    why_not: str | None = field(default=None, compare=False)
    """Why there are no chunks, if there are none: `not stored`, or what was wrong, a sentence for people."""

    @property
    def tokens(self) -> int:
        """Total tokens of its chunks."""
        return sum(chunk.header.geometry.tokens for chunk in self.chunks)

    def to_bytes(self) -> bytes:
        """The match for another process, which reads it with `from_bytes`. The leases go with it: whichever process
        finishes a fetch of it or releases it first ends them, and a second release has no effect.

        Raises MatchFormatError for a match that takes more than MAX_MATCH_BYTES."""
        holders = [chunk.member for chunk in self.chunks] + [lease.member for lease in self.leases]
        members = list(dict.fromkeys(holders))
        number = {member: index for index, member in enumerate(members)}
        values: list[bool | int | float | str | bytes] = [len(members)]
        for member in members:
            values += [member.node_id, member.endpoint, float(member.weight), member.bulk_endpoint]
            values += [member.domain, member.draining]
        values.append(len(self.chunks))
        for chunk in self.chunks:
            values += [number[chunk.member], chunk.first_token, chunk.exact, len(chunk.variants)]
            for variant in chunk.variants:
                values += [variant.header_data, variant.on_disk]
        values.append(len(self.leases))
        for lease in self.leases:
            asked = np.array(lease.asked, _INDEX_DTYPE).tobytes()
            values += [number[lease.member], lease.lease_id, asked, lease.used, lease.tokens]
        values.append((self.why_not or "")[: _MAX_TEXT_BYTES // 4])
        signed = _PREFIX.pack(_MAGIC, _VERSION) + b"".join(map(msgpack.packb, values))
        if len(signed) + _CHECKSUM.size > MAX_MATCH_BYTES:
            raise MatchFormatError(
                f"a match of {len(self.chunks)} chunks takes {len(signed)} bytes; {MAX_MATCH_BYTES} can be passed on"
            )
        return signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))

    @classmethod
    def from_bytes(cls, data: bytes, spec: ModelSpec, ready_klt: Callable[[bytes], KLT | None]) -> Match:
        """A match of this model that `to_bytes` wrote. It names the endpoints that a client connects to, with its
        credentials: take it only from processes that are trusted with these.

        Variants whose calibration `ready_klt` does not have are left out where the chunk has others. Where it has none
        the chunk stays in the match, which is a run of neighbours, and a fetch reports it as missing at once.

        Raises MatchFormatError for any other bytes."""
        try:
            return _Reader(data, spec, ready_klt).match()
        except MatchFormatError:
            raise
        # Bytes with a right checksum may still be anything: whatever does not parse is one thing, a bad match.
        except (CodecError, ValueError, msgpack.UnpackException) as error:
            raise MatchFormatError(f"the match cannot be read: {repr(error)[:200]}") from error


def bytes_of_endpoints(chunks: Iterable[StoredChunk]) -> Counter[str]:
    """Bytes that each endpoint sends of these chunks, each in its first variant."""
    sizes: Counter[str] = Counter()
    for chunk in chunks:
        sizes[chunk.member.endpoint] += chunk.body_bytes
    return sizes


class _Reader:
    """Reads one match, value by value."""

    def __init__(self, data: bytes, spec: ModelSpec, ready_klt: Callable[[bytes], KLT | None]) -> None:
        if not _PREFIX.size + _CHECKSUM.size <= len(data) <= MAX_MATCH_BYTES:
            raise MatchFormatError(f"{len(data)} bytes are no match, or more than {MAX_MATCH_BYTES}")
        magic, version = _PREFIX.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise MatchFormatError(
                f"these bytes begin with {magic.hex()} and version {version}; a match that can be read begins with "
                f"{_MAGIC.hex()} and version {_VERSION}"
            )
        signed = memoryview(data)[: -_CHECKSUM.size]
        if _CHECKSUM.unpack_from(data, len(signed)) != (xxhash.xxh3_64_intdigest(signed),):
            raise MatchFormatError("the match was damaged: its checksum does not match")
        self._spec, self._ready_klt = spec, ready_klt
        self._klts: dict[bytes, KLT | None] = {}
        self._values = msgpack.Unpacker(
            read_size=len(data),
            max_buffer_size=len(data),
            max_bin_len=MAX_HEADER_BYTES,
            max_str_len=_MAX_TEXT_BYTES,
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        self._values.feed(signed[_PREFIX.size :])
        self._end = len(signed) - _PREFIX.size

    def match(self) -> Match:
        members = [self._member() for _ in range(self._number())]
        chunks: list[StoredChunk] = []
        end = 0
        for _ in range(self._number()):
            chunk = self._chunk(members)
            if chunk.first_token < end:
                raise MatchFormatError("the chunks of a match overlap, or are not in order")
            end = chunk.first_token + chunk.header.geometry.tokens
            chunks.append(chunk)
        leases = [self._lease(members) for _ in range(self._number())]
        why_not = self._take(str) or None
        if self._values.tell() != self._end:
            raise MatchFormatError(f"{self._end - self._values.tell()} bytes follow the end of the match")
        return Match(tuple(chunks), tuple(leases), why_not)

    def _take(self, kind: type[Value]) -> Value:
        value = self._values.unpack()
        if type(value) is not kind:
            raise MatchFormatError(f"a match has a {type(value).__name__} in place of a {kind.__name__}")
        return value

    def _number(self, most: int = _MAX_NUMBER) -> int:
        number = self._take(int)
        if not 0 <= number <= most:
            raise MatchFormatError(f"a match has the number {number} where 0 to {most} can be")
        return number

    def _member(self) -> Member:
        return Member(
            node_id=self._take(str),
            endpoint=self._take(str),
            weight=self._take(float),
            bulk_endpoint=self._take(str),
            domain=self._take(str),
            draining=self._take(bool),
        )

    def _chunk(self, members: list[Member]) -> StoredChunk:
        member = members[self._number(len(members) - 1)]
        first_token, exact = self._number(), self._take(bool)
        variants = [self._variant() for _ in range(self._number())]
        if not variants:
            raise MatchFormatError("a chunk of a match has no variant")
        chunk_id, tokens = variants[0].header.chunk_id, variants[0].header.geometry.tokens
        for variant in variants:
            variant.header.require(model_digest=self._spec.digest, chunk_id=chunk_id)
            if variant.header.geometry.tokens != tokens:
                raise MatchFormatError(
                    f"the variants of chunk {chunk_id.short} have different numbers of tokens"
                )
        decodable = tuple(variant for variant in variants if variant.is_decodable)
        return StoredChunk(chunk_id, decodable or tuple(variants), member, first_token, exact)

    def _variant(self) -> Variant:
        data = self._take(bytes)
        header, on_disk = read_header(data), self._take(bool)
        spec, shape = self._spec, header.geometry
        found = shape.layers, shape.kv_heads, shape.head_dim, shape.dtype
        if found != (spec.layers, spec.kv_heads, spec.head_dim, spec.dtype):
            raise MatchFormatError(f"chunk {header.chunk_id.short} is not of the shape of this model's KV")
        return Variant(header, data, self._klt(header.calibration), on_disk)

    def _klt(self, digest: bytes | None) -> KLT | None:
        if digest is None:
            return None
        if digest not in self._klts:
            if len(self._klts) == _MAX_CALIBRATIONS:
                raise MatchFormatError(f"a match names more than {_MAX_CALIBRATIONS} calibrations")
            klt = self._klts[digest] = self._ready_klt(digest)
            if klt is not None:
                klt.calibration.require(self._spec)
        return self._klts[digest]

    def _lease(self, members: list[Member]) -> Lease:
        member = members[self._number(len(members) - 1)]
        lease_id, asked = self._take(bytes), np.frombuffer(self._take(bytes), _INDEX_DTYPE)
        return Lease(member, lease_id, asked.tolist(), self._take(bytes), self._number())
