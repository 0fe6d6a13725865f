"""Parsers of what the cluster keeps: the catalogue, the records of the disk tier, and forgotten tenants."""

import functools
import itertools
import json
import random
import shutil
import struct
from collections.abc import Sequence
from typing import Any

import xxhash

from kvstore_api.placement import Member, Membership, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_bench.hostile.folder import folder
from kvstore_bench.hostile.parser import IgnoredError, Parser, WrongResultError
from kvstore_bench.hostile.values import JSON, mutated_document
from kvstore_cluster.catalogue.base import ClusterState, NodeRecord
from kvstore_cluster.catalogue.document import read_document, write_document
from kvstore_cluster.catalogue.redis import read_saved
from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_cluster.disk.forgotten import ForgottenRecords, read_forgotten, write_forgotten
from kvstore_cluster.disk.record import BLOCK_BYTES, Kind, RecordHeader, blocks_of
from kvstore_cluster.disk.segment_format import VERSION, first_block, opening
from kvstore_cluster.encryption import FileCipher
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CatalogueError, DiskError, KVStoreError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

_MOST_MUTANT_BYTES = 1 << 20
_FORGOTTEN = "forgotten.json"
_SEED = 12345
_ENCODING = Encoding.parse("exact-raw")
_FRAME = bytes(16)
_STORE_BYTES = 64 << 20


def parsers() -> list[Parser]:
    return [
        Parser("catalogue", _catalogues, _catalogue_mutant, _read_catalogue, (CatalogueError,)),
        Parser("redis-catalogue", _saved, _saved_mutant, _read_saved, (CatalogueError,)),
        Parser("forgotten-tenants", _forgotten, _forgotten_mutant, _read_forgotten, (IgnoredError,)),
        Parser("disk-tier", _segments, _segment_mutant, _recover, (DiskError,)),
    ]


@functools.cache
def _catalogues() -> Sequence[bytes]:
    return (write_document(_state(3)).encode(), write_document(_state(8000)).encode())


def _state(pins: int) -> ClusterState:
    nodes = tuple(
        NodeRecord(Member(name, f"10.0.0.1:{port}", 1.0, "10.0.0.1:9", "rack"), 3, alive, "")
        for name, port, alive in (("a", 7, True), ("b", 8, False))
    )
    chunks = frozenset(_chunk_id(number) for number in range(pins))
    forgotten = Forgotten({"gone": 2}, 1)
    return ClusterState(
        7, nodes, {"": chunks, "acme": chunks}, {"acme": 1 << 30}, frozenset({"b"}), 4, 5, forgotten
    )


def _chunk_id(number: int) -> ChunkId:
    return ChunkId(ContentId(number.to_bytes(32, "big")), PrefixId(b"\1" * 32))


def _catalogue_mutant(rng: random.Random) -> bytes:
    """Edits the state, which the checksum covers, or the whole document."""
    document = json.loads(_catalogues()[0])
    if rng.random() < 0.2:
        return mutated_document(rng, JSON, document, _MOST_MUTANT_BYTES)
    return sealed_json(document, "state", mutated_document(rng, JSON, document["state"], _MOST_MUTANT_BYTES))


def sealed_json(document: dict[str, Any], field: str, content: bytes) -> bytes:
    """The document with this JSON in a field, which its checksum covers."""
    document = document | {"checksum": _checksum(content), field: None}
    return json.dumps(document).encode().replace(b"null", content, 1)


def _checksum(content: bytes) -> str:
    """The checksum of JSON content. That of content that is no JSON never matters."""
    try:
        return xxhash.xxh3_64_hexdigest(json.dumps(json.loads(content), sort_keys=True).encode())
    except (ValueError, RecursionError):
        return ""


def _read_catalogue(data: bytes) -> None:
    _use(read_document(data.decode(errors="replace"), "file"))


def _use(state: ClusterState) -> None:
    """Uses a state as the coordinator does: writes it, places chunks, answers calls."""
    if read_document(write_document(state), "file") != state:
        raise WrongResultError("a catalogue that differs when it is written and read again")
    members = tuple(node.member for node in state.nodes if node.alive)
    Placement(Membership(state.epoch, members, 2).members, 2).owners([bytes(32)])
    for node in state.nodes:
        member = pb.Member(
            node_id=node.member.node_id,
            endpoint=node.member.endpoint,
            weight=node.member.weight,
            bulk_endpoint=node.member.bulk_endpoint,
            domain=node.member.domain,
            draining=node.member.draining,
        )
        pb.NodeStatus(member=member, alive=node.alive, error=node.error)
    pb.ClusterStatsReply(epoch=state.epoch)
    for tenant, quota_bytes in state.quotas.items():
        pb.Quota(tenant=tenant, limit_bytes=quota_bytes)
    for name in (*state.draining, *state.pins, *state.forgotten.tenants):
        name.encode()


@functools.cache
def _saved() -> Sequence[bytes]:
    return tuple(b"7 token\n" + document for document in _catalogues())


def _saved_mutant(rng: random.Random) -> bytes:
    revision = rng.choice(
        (b"7 token", b"", b"-1", b"x", b"9" * 5000, b"\xff", b"0x7 t", "٣".encode(), b"1e5 t", b" ")
    )
    return revision + b"\n" + _catalogue_mutant(rng)


def _read_saved(data: bytes) -> None:
    revision, _, document = data.partition(b"\n")
    saved, state = read_saved(document, revision, "redis")
    if saved.number < 0:
        raise WrongResultError("a negative revision")
    _use(state)


@functools.cache
def _forgotten() -> Sequence[bytes]:
    found = []
    for tenants in (2, 4096):
        names = [f"tenant-{number}" for number in range(tenants)]
        applied = Forgotten({name: number + 2 for number, name in enumerate(names)}, 1)
        write_forgotten(folder(), ForgottenRecords(applied, dict.fromkeys(names, 77), 5), FileCipher())
        found.append((folder() / _FORGOTTEN).read_bytes())
    return found


def _forgotten_mutant(rng: random.Random) -> bytes:
    document = json.loads(_forgotten()[0])
    if rng.random() < 0.2:
        return mutated_document(rng, JSON, document, _MOST_MUTANT_BYTES)
    content = mutated_document(rng, JSON, document["content"], _MOST_MUTANT_BYTES)
    return sealed_json(document, "content", content)


def _read_forgotten(data: bytes) -> None:
    (folder() / _FORGOTTEN).write_bytes(data)
    found, _ = read_forgotten(folder(), FileCipher())
    if found == ForgottenRecords():
        raise IgnoredError
    write_forgotten(folder(), found, FileCipher())
    if read_forgotten(folder(), FileCipher())[0] != found:
        raise WrongResultError("forgotten tenants that differ when they are written and read again")
    RecordHeader(Kind.PUT, found.newest_sequence + 1, _meta(0)).encode(_SEED)
    found.hides("acme", 5)
    for tenant in found.applied.tenants:
        tenant.encode()


@functools.cache
def _segments() -> Sequence[bytes]:
    """A segment with an index of its records, and one without."""
    headers = [RecordHeader(Kind.PUT, number + 1, _meta(number)) for number in range(3)]
    headers.append(RecordHeader(Kind.TOMBSTONE, 1, _meta(0), 1))
    packed = [header.encode(_SEED) for header in headers]
    return (_files(packed, _index(packed, [1, 3, 5, 7])), _files(packed, b""))


def _meta(number: int) -> RecordMeta:
    size_bytes = len(_chunk(number))
    header_bytes = size_bytes - len(_FRAME)
    return RecordMeta(
        _chunk_id(number), _ENCODING.name, size_bytes, header_bytes, None, "acme", 1.0, 0.0, 1, _chunk_id(9)
    )


@functools.cache
def _chunk(number: int) -> bytes:
    geometry = Geometry(1, 1, 4, KVDtype.BFLOAT16, tokens=1, frame_tokens=1, period_layers=1)
    return write_header(bytes(32), _chunk_id(number), _ENCODING, geometry, [_FRAME])[1] + _FRAME


def _index(headers: Sequence[bytes], blocks: Sequence[int]) -> bytes:
    return b"".join(struct.pack("<I", block) + header for block, header in zip(blocks, headers, strict=True))


def _files(headers: Sequence[bytes], index: bytes, segment_number: int = 1) -> bytes:
    """A segment of these records and, if `index` is not empty, its index file: the size of the segment, and both."""
    blocks = [first_block(opening(VERSION, segment_number, _SEED))]
    for number, header in enumerate(headers):
        blocks.append(header.ljust(BLOCK_BYTES, b"\0")[:BLOCK_BYTES])
        if number < 3:
            blocks.append(_chunk(number).ljust(BLOCK_BYTES, b"\0"))
    segment = b"".join(blocks)
    signed = struct.pack("<8sIIQQ", b"KVSINDEX", 1, segment_number, _SEED, len(segment))
    checksum = xxhash.xxh3_64_intdigest(signed + index)
    file = signed + struct.pack("<Q", checksum) + index if index else b""
    return struct.pack("<I", len(segment)) + segment + file


def _segment_mutant(rng: random.Random) -> bytes:
    """Edits the header of a record, and makes its checksum right again with the segment's secret seed. Edits the index,
    whose checksum is right, too."""
    headers = [RecordHeader(Kind.PUT, number + 1, _meta(number)) for number in range(3)]
    packed = [header.encode(_SEED) for header in headers] + [
        RecordHeader(Kind.TOMBSTONE, 1, _meta(0), 1).encode(_SEED)
    ]
    number = rng.randrange(4)
    packed[number] = _edited_header(rng, packed[number])
    blocks = [1, 3, 5, 7]
    if rng.random() < 0.3:
        blocks[rng.randrange(4)] = rng.choice((0, 1, 2, 3, 7, 8, 2**24, 2**32 - 1))
    if rng.random() < 0.5:
        return _files(packed, b"")
    index = bytearray(_index(packed, blocks))
    if rng.random() < 0.3:
        at = rng.randrange(len(index))
        match rng.randrange(3):
            case 0:
                index[at] ^= 1 << rng.randrange(8)
            case 1:
                del index[at:]
            case 2:
                index[at:at] = rng.randbytes(rng.randint(1, 9))
    return _files(packed, bytes(index) or b"\0")


def _edited_header(rng: random.Random, header: bytes) -> bytes:
    opening, signed = bytearray(header[:8]), bytearray(header[16:])
    for _ in range(rng.choice((1, 1, 3))):
        match rng.randrange(5):
            case 0:  # magic, version, kind, length
                opening[rng.choice((4, 5, 5, 6, 7))] = rng.choice((0, 1, 2, 3, 20, 255))
            case 1:  # sequence, size, chunk header length, horizon
                at, size = rng.choice(((0, 8), (8, 8), (16, 4), (20, 4)))
                number = rng.choice((0, 1, 4096, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) & ((1 << 8 * size) - 1)
                signed[at : at + size] = number.to_bytes(size, "little")
            case 2:  # cost and expiry
                at = rng.choice((24, 32))
                cost = rng.choice((-1.0, 1e308, float("inf"), float("nan"), 5e-324))
                signed[at : at + 8] = struct.pack("<d", cost)
            case 3:  # lengths of the names
                signed[rng.choice((40, 41, 42, 43))] = rng.choice((0, 1, 5, 11, 200, 255))
            case 4:
                signed[rng.randrange(44, len(signed))] = rng.randrange(256)
    checksum = xxhash.xxh3_64(bytes(opening), _SEED)
    checksum.update(bytes(signed))
    # The checksum covers as many bytes as the header says that it has.
    length = int.from_bytes(opening[6:8], "little")
    if 16 <= length < 16 + len(signed):
        checksum = xxhash.xxh3_64(bytes(opening), _SEED)
        checksum.update(bytes(signed[: length - 16]))
    return bytes(opening) + struct.pack("<Q", checksum.intdigest()) + bytes(signed)


_numbers = itertools.count()


def _recover(data: bytes) -> None:
    place = folder() / f"store-{next(_numbers)}"
    place.mkdir()
    (size,) = struct.unpack_from("<I", data)
    (place / "segment-00000001.kvs").write_bytes(data[4 : 4 + size])
    if len(data) > 4 + size:
        (place / "segment-00000001.index").write_bytes(data[4 + size :])
    store = SegmentStore(place, _STORE_BYTES, direct=False, sync_period_s=60)
    try:
        for meta, location in store.recover().records:
            _read_record(store, meta, location)
        store.check_integrity()
        chunk = _chunk(7)
        location = store.append(_meta(7), [memoryview(chunk)], sync=False)
        found = bytearray(len(chunk))
        store.read(location, 0, [memoryview(found)])
        if found != chunk:
            raise WrongResultError("a chunk that differs when it is read")
    finally:
        store.close()
        shutil.rmtree(place)


def _read_record(store: SegmentStore, meta: RecordMeta, location: Any) -> None:
    """Reads a record as a node does, which verifies what it reads. Its reader may refuse it."""
    if not 0 < meta.size_bytes <= _STORE_BYTES or blocks_of(meta.size_bytes) >= 1 << 24:
        raise WrongResultError(f"a record of {meta.size_bytes} bytes in a smaller store")
    if not 0 < meta.header_bytes <= meta.size_bytes:
        raise WrongResultError(f"a record whose header of {meta.header_bytes} bytes is longer than its chunk")
    try:
        store.read(location, 0, [memoryview(bytearray(meta.size_bytes))])
    except KVStoreError:
        return
