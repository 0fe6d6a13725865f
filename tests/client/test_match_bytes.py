"""A match on its way to another process: what arrives, and what bytes that are no match do."""

import struct
import tracemalloc
from collections.abc import Sequence

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_api.placement import Member
from kvstore_client.match import MAX_MATCH_BYTES, Match, StoredChunk, Variant
from kvstore_client.replicas import Lease
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import MatchFormatError
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from tests.client.chunks import SPEC, ids, random_kv
from tests.codec.chunks import features_of, make_calibration

KLT_OF_SPEC = KLT(make_calibration(SPEC))
NAMES = ["exact-zstd", "medium-zstd", "medium-klt-zstd"]
PREFIX_BYTES = 6


def variants_of(seed: int) -> dict[str, Variant]:
    """Of one chunk, by encoding."""
    keys, values = random_kv(seed)
    found: dict[str, Variant] = {}
    for name in NAMES:
        encoding = Encoding.parse(name)
        klt = KLT_OF_SPEC if encoding.needs_calibration else None
        encoded = encode_chunk(
            keys,
            values,
            spec=SPEC,
            chunk_id=ids(4)[seed],
            encoding=encoding,
            klt=klt,
            features=features_of(256) if klt else None,
        )
        found[name] = Variant(encoded.header, encoded.parts[0], klt)
    return found


VARIANTS = [variants_of(seed) for seed in range(4)]


def ready(digest: bytes) -> KLT | None:
    return KLT_OF_SPEC if digest == KLT_OF_SPEC.calibration.digest else None


def read(data: bytes) -> Match:
    return Match.from_bytes(data, SPEC, ready)


members = st.builds(
    Member,
    node_id=st.text(max_size=40),
    endpoint=st.text(max_size=40),
    weight=st.floats(min_value=0.001, max_value=1e9),
    bulk_endpoint=st.text(max_size=40),
    domain=st.text(max_size=40),
    draining=st.booleans(),
)


@st.composite
def matches(draw: st.DrawFn) -> Match:
    nodes = draw(st.lists(members, min_size=1, max_size=3))
    chunks: list[StoredChunk] = []
    first_token = 0
    for known in VARIANTS[: draw(st.integers(0, 4))]:
        first_token += draw(st.integers(0, 300))
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        variants = tuple(
            Variant(known[name].header, known[name].header_data, known[name].klt, draw(st.booleans()))
            for name in names
        )
        member, exact = draw(st.sampled_from(nodes)), draw(st.booleans())
        chunks.append(StoredChunk(variants[0].header.chunk_id, variants, member, first_token, exact))
        first_token += 256
    leases = st.builds(
        Lease,
        member=st.sampled_from(nodes),
        lease_id=st.binary(min_size=16, max_size=16),
        asked=st.lists(st.integers(0, 1 << 20), max_size=8),
        used=st.binary(max_size=2),
        tokens=st.integers(0, 1 << 30),
    )
    return Match(tuple(chunks), tuple(draw(st.lists(leases, max_size=3))), draw(st.none() | st.text()))


@given(matches())
@settings(max_examples=60, deadline=None)
def test_what_arrives_is_what_was_found(match: Match) -> None:
    arrived = read(match.to_bytes())
    assert arrived == match
    assert arrived.tokens == match.tokens
    assert arrived.why_not == ((match.why_not or "")[:1024] or None)
    assert [[v.klt for v in chunk.variants] for chunk in arrived.chunks] == [
        [v.klt for v in chunk.variants] for chunk in match.chunks
    ]


def match_of(chunks: int = 3, names: Sequence[str] = NAMES) -> Match:
    member = Member("node-0", "127.0.0.1:1", domain="rack")
    found = [
        StoredChunk(ids(4)[i], tuple(VARIANTS[i][name] for name in names), member, 256 * i)
        for i in range(chunks)
    ]
    return Match(tuple(found), (Lease(member, bytes(16), [*range(chunks)], b"\x07", 256 * chunks),))


def test_no_tensor_travels() -> None:
    assert len(match_of().to_bytes()) < 4096 < len(KLT_OF_SPEC.calibration.to_bytes())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_no_match(data: st.DataObject) -> None:
    sound = match_of().to_bytes()
    at = data.draw(st.integers(0, len(sound) - 1))
    flipped = sound[at] ^ data.draw(st.integers(1, 255))
    with pytest.raises(MatchFormatError):
        read(sound[:at] + bytes([flipped]) + sound[at + 1 :])
    with pytest.raises(MatchFormatError):
        read(sound[:at])
    with pytest.raises(MatchFormatError):
        read(sound + sound[:at] + b"\0")


def signed(values: bytes) -> bytes:
    """Whatever bytes, with a right checksum."""
    data = struct.pack("<4sH", b"KVM\0", 1) + values
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_bytes_with_a_right_checksum_are_a_match_or_one_error(data: st.DataObject) -> None:
    sound = match_of().to_bytes()[PREFIX_BYTES:-8]
    at = data.draw(st.integers(0, len(sound)))
    until = data.draw(st.integers(at, len(sound)))
    hostile = sound[:at] + data.draw(st.binary(max_size=40)) + sound[until:]
    try:
        match = read(signed(hostile))
    except MatchFormatError:
        return
    for chunk in match.chunks:
        assert chunk.variants
        assert chunk.first_token >= 0


@pytest.mark.parametrize(
    "values",
    [
        b"\x90" * (1 << 20),
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\x81" * (1 << 20),
        b"\xce\x7f\xff\xff\xff",
        b"\x00\xce\x7f\xff\xff\xff" + b"\x00" * (1 << 20),
        b"\x00\x00\xce\x7f\xff\xff\xff",
        b"\xc6\x7f\xff\xff\xff",
        b"\xd6\xff\x00\x00\x00\x00",
    ],
    ids=[
        "nested",
        "huge arrays",
        "maps",
        "huge number of members",
        "zeros",
        "huge number of leases",
        "bytes",
        "time",
    ],
)
def test_hostile_bytes_take_memory_as_they_are_long(values: bytes) -> None:
    data = signed(values)
    tracemalloc.start()
    try:
        with pytest.raises(MatchFormatError):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data) + (256 << 10)
    finally:
        tracemalloc.stop()


def test_numbers_and_places_that_cannot_be_are_refused() -> None:
    sound = match_of(1, ["exact-zstd"])
    chunk, lease = sound.chunks[0], sound.leases[0]
    for wrong in (
        Match((chunk, chunk)),
        Match((StoredChunk(chunk.chunk_id, (), chunk.member, 0),)),
        Match((StoredChunk(chunk.chunk_id, chunk.variants, chunk.member, 1 << 40),)),
        Match((StoredChunk(chunk.chunk_id, chunk.variants, chunk.member, -1),)),
        Match(
            (StoredChunk(chunk.chunk_id, (chunk.variants[0], VARIANTS[1]["exact-zstd"]), chunk.member, 0),)
        ),
        Match((), (lease._replace(tokens=1 << 62),)),
    ):
        with pytest.raises(MatchFormatError):
            read(wrong.to_bytes())
    with pytest.raises(MatchFormatError):
        read(signed(b"".join(map(msgpack.packb, [0, 1, 0, 0, True, 1]))))  # a chunk without members


def test_a_match_of_another_model_is_refused() -> None:
    other = ModelSpec("other", bytes(32), 6, 2, 16, KVDtype.FLOAT32, RopeSpec("default", 1e4, 16))
    with pytest.raises(MatchFormatError, match="another model"):
        Match.from_bytes(match_of(1, ["exact-zstd"]).to_bytes(), other, ready)
    with pytest.raises(MatchFormatError, match="calibration"):
        Match.from_bytes(match_of(1, ["medium-klt-zstd"]).to_bytes(), other, ready)


def test_a_match_of_absurd_size_is_not_passed_on() -> None:
    lease = Lease(Member("node-0", "127.0.0.1:1"), bytes(16), range(1 << 18))
    huge = Match((), (lease,) * (MAX_MATCH_BYTES >> 20))
    with pytest.raises(MatchFormatError, match="the limit is"):
        huge.to_bytes()
    with pytest.raises(MatchFormatError):
        read(signed(bytes(MAX_MATCH_BYTES)))


def test_without_its_calibration_a_chunk_arrives_in_its_other_encodings_or_undecodable() -> None:
    both = Match.from_bytes(match_of(2, ["medium-klt-zstd", "exact-zstd"]).to_bytes(), SPEC, lambda _: None)
    assert [[v.header.encoding.name for v in chunk.variants] for chunk in both.chunks] == [["exact-zstd"]] * 2
    only = Match.from_bytes(match_of(2, ["medium-klt-zstd"]).to_bytes(), SPEC, lambda _: None)
    assert len(only.chunks) == 2
    assert not any(chunk.variants[0].is_decodable for chunk in only.chunks)
