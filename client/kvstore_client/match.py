"""Result of a lookup: the stored chunks of a prompt, the nodes that hold them, and the leases on them.

One process may find a match and another one fetch it, as in engines whose scheduler runs in its own process.
`Match.to_bytes` writes

magic "KVM\\0" | version u16 | msgpack values without nesting | xxh3_64 of all preceding bytes, u64

The values are counts, names and chunk headers as the nodes sent them. The bytes hold no tensors: they name a
calibration by its digest, and the receiving process uses its own copy. A reader allocates memory in proportion to the
bytes that it is given, and never recurses.
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
"""The reader starts one thread for each calibration that is not loaded yet."""
_MAX_NUMBER = (1 << 31) - 1
_PREFIX = struct.Struct("<4sH")
_MAGIC, _VERSION = b"KVM\0", 1
_CHECKSUM = struct.Struct("<Q")
_INDEX_DTYPE = np.dtype("<u4")

Value = TypeVar("Value", bool, int, float, str, bytes)


@dataclass(frozen=True, slots=True)
class Variant:
    """One encoding in which a chunk is stored."""

    header: ChunkHeader
    header_data: bytes = field(repr=False)
    """Bytes of `header`, as the node sent them."""
    klt: KLT | None = None
    """Calibration named in the header. None if the header names none, or if it is not loaded yet: the variant cannot be
    decoded then."""
    on_disk: bool = False
    """Whether the node has it only on disk."""

    @property
    def is_decodable(self) -> bool:
        return self.klt is not None or self.header.calibration is None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A stored chunk of the prompt: its variants and the node that holds it."""

    chunk_id: ChunkId
    """Id under which the chunk is stored and read."""
    variants: tuple[Variant, ...]
    """Usable variants, at least one: the most faithful first, and equally faithful ones in the order of
    `EncodingSettings.accept`."""
    member: Member
    first_token: int
    """Position of the chunk's first token in the prompt."""
    exact: bool = True
    """Whether the KV was computed in the prompt's own context. Otherwise it is that of the same tokens behind another
    text, and only approximates the prompt's KV."""

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
        """Total size of all frames of the first variant, bytes."""
        return self.header.size_bytes - self.header.header_bytes


@dataclass(frozen=True, slots=True)
class Match:
    """Chunks of a prompt to reuse, ordered by position and leased until the match is fetched or released."""

    chunks: tuple[StoredChunk, ...] = ()
    leases: tuple[Lease, ...] = ()
    why_not: str | None = field(default=None, compare=False)
    """Why the match is empty, a sentence for people: `not stored`, or the failure."""

    @property
    def tokens(self) -> int:
        """Total tokens of the chunks."""
        return sum(chunk.header.geometry.tokens for chunk in self.chunks)

    def to_bytes(self) -> bytes:
        """Serialise the match for another process, which reads it with `from_bytes`. The leases go with it: the first
        fetch or release that finishes in either process ends them, and a second release has no effect.

        Raises MatchFormatError for a match of more than MAX_MATCH_BYTES.
        """
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
                f"a match of {len(self.chunks)} chunks takes {len(signed)} bytes; the limit is {MAX_MATCH_BYTES}"
            )
        return signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        spec: ModelSpec,
        ready_klt: Callable[[bytes], KLT | None],
        read: Callable[[bytes], ChunkHeader] = read_header,
    ) -> Match:
        """Read a match of this model that `to_bytes` wrote. The client connects with its credentials to the endpoints
        that the match names, so accept a match only from processes that are trusted with these credentials.

        Variants whose calibration `ready_klt` does not have are dropped where the chunk has others. A chunk without
        others stays, because a prefix match is a run of neighbours; a fetch reports it as missing at once.

        `read` reads the chunks' headers, and raises a CodecError for those that are not trusted.

        Raises MatchFormatError for any other bytes, and for headers that `read` refuses.
        """
        try:
            return _Reader(data, spec, ready_klt, read).match()
        except MatchFormatError:
            raise
        # Bytes with a valid checksum may still hold anything: whatever does not parse is reported as a bad match.
        except (CodecError, ValueError, msgpack.UnpackException) as error:
            raise MatchFormatError(f"the match cannot be read: {repr(error)[:200]}") from error


def bytes_of_endpoints(chunks: Iterable[StoredChunk]) -> Counter[str]:
    """Bytes that each endpoint sends for these chunks, each in its first variant."""
    sizes: Counter[str] = Counter()
    for chunk in chunks:
        sizes[chunk.member.endpoint] += chunk.body_bytes
    return sizes


class _Reader:
    """Reads the values of one serialised match."""

    def __init__(
        self,
        data: bytes,
        spec: ModelSpec,
        ready_klt: Callable[[bytes], KLT | None],
        read: Callable[[bytes], ChunkHeader],
    ) -> None:
        if not _PREFIX.size + _CHECKSUM.size <= len(data) <= MAX_MATCH_BYTES:
            raise MatchFormatError(
                f"{len(data)} bytes are too short for a match, or more than {MAX_MATCH_BYTES}"
            )
        magic, version = _PREFIX.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise MatchFormatError(
                f"these bytes begin with {magic.hex()} and version {version}; a match that can be read begins with "
                f"{_MAGIC.hex()} and version {_VERSION}"
            )
        signed = memoryview(data)[: -_CHECKSUM.size]
        if _CHECKSUM.unpack_from(data, len(signed)) != (xxhash.xxh3_64_intdigest(signed),):
            raise MatchFormatError("the match was damaged: its checksum does not match")
        self._spec, self._ready_klt, self._read_header = spec, ready_klt, read
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
            raise MatchFormatError(f"a match has a {type(value).__name__} where a {kind.__name__} belongs")
        return value

    def _number(self, most: int = _MAX_NUMBER) -> int:
        number = self._take(int)
        if not 0 <= number <= most:
            raise MatchFormatError(f"a match has the number {number}; 0 to {most} is allowed")
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
        header, on_disk = self._read_header(data), self._take(bool)
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
