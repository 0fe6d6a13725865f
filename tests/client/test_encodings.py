"""Chunks that are stored in several encodings: which of them a client finds, and in which order."""

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import kvstore_codec.codec
from kvstore_client.client import KVStoreClient, connect
from kvstore_client.match import Match
from kvstore_client.new_chunk import NewChunk
from kvstore_client.settings import ClientSettings
from kvstore_cluster.node import StorageNode
from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from tests.client.chunks import SPEC, encoded_chunk, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster

NAMES = ["exact-zstd", "exact-raw", "high-zstd", "high-raw@128", "medium-raw", "low-zstd", "step0.5-zstd"]


@pytest.fixture(autouse=True)
def _chosen_among(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed policy takes encodings in the order of `accept`; the others see the most faithful first."""
    monkeypatch.setenv("KVSTORE_FETCH_POLICY", "adaptive")


def store(address: str, encoding: str, document: list[ChunkId], folder: Path) -> None:
    with connect(address, encoding=encoding, cache_dir=folder) as client:
        assert put(client, document) == len(document)


def put(client: KVStoreClient, document: list[ChunkId], **arguments: Any) -> int:
    new = [NewChunk(chunk_id, partial(random_kv, index)) for index, chunk_id in enumerate(document)]
    return client.store.put(SPEC, new, **arguments).result(20)


def offered(match: Match) -> list[list[str]]:
    return [[variant.header.encoding.name for variant in chunk.variants] for chunk in match.chunks]


def found(address: str, document: list[ChunkId], **settings: Any) -> list[list[str]]:
    with connect(address, **settings) as client:
        match = client.match(SPEC, document)
        client.release(match)
        return offered(match)


def damage(node: StorageNode, chunk_id: ChunkId, encoding: str) -> None:
    """Turn over a bit in the header, as failing memory would."""
    with node.open(chunk_id, encoding) as reader:
        (view,) = next(iter(reader.pieces(0, 0, 64)))
        address = np.frombuffer(view, np.uint8).ctypes.data + 40
        ctypes.c_ubyte.from_address(address).value ^= 1


def test_all_accepted_encodings_are_found_most_faithful_first(cluster: ServedCluster, tmp_path: Path) -> None:
    document = ids(2)
    for name in reversed(NAMES):
        store(cluster.address, name, document, tmp_path)
    asked = ("step0.5-zstd", "medium-raw", "exact-raw", "exact-zstd")
    assert (
        found(cluster.address, document, accept=asked)
        == [["exact-raw", "exact-zstd", "medium-raw", "step0.5-zstd"]] * 2
    )
    assert found(cluster.address, document, accept=("medium-raw",)) == [["medium-raw"]] * 2
    assert (
        found(cluster.address, document, floor="high")
        == [["exact-zstd", "exact-raw", "high-raw@128", "high-zstd"]] * 2
    )
    assert (
        found(cluster.address, document, floor="low", accept=("step0.5-zstd",))
        == [
            ["exact-raw", "exact-zstd", "high-raw@128", "high-zstd", "medium-raw", "low-zstd", "step0.5-zstd"]
        ]
        * 2
    )
    cluster.check_nothing_is_held()


def test_a_chunk_need_not_be_stored_in_all_encodings(cluster: ServedCluster, tmp_path: Path) -> None:
    document = ids(3)
    store(cluster.address, "exact-zstd", document[:2], tmp_path)
    store(cluster.address, "medium-raw", document[1:], tmp_path)
    both = {"accept": ("exact-zstd", "medium-raw")}
    assert found(cluster.address, document, **both) == [
        ["exact-zstd"],
        ["exact-zstd", "medium-raw"],
        ["medium-raw"],
    ]
    assert found(cluster.address, document, accept=("exact-zstd",)) == [["exact-zstd"]] * 2


def test_chunks_below_the_floor_are_not_there(cluster: ServedCluster, tmp_path: Path) -> None:
    document = ids(1)
    store(cluster.address, "low-zstd", document, tmp_path)
    assert found(cluster.address, document, floor="medium") == []
    assert found(cluster.address, document, floor="low") == [["low-zstd"]]


def test_a_damaged_variant_is_counted_and_another_one_used(cluster: ServedCluster, tmp_path: Path) -> None:
    document = ids(1)
    store(cluster.address, "exact-zstd", document, tmp_path)
    store(cluster.address, "medium-raw", document, tmp_path)
    damage(cluster.nodes[0], document[0], "medium-raw")
    with connect(cluster.address, accept=("medium-raw", "exact-zstd")) as client:
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == [["exact-zstd"]]
        assert client.metrics.snapshot()["miss_bad_header"] == 1


def test_a_chunk_with_other_layers_than_its_name_says_is_refused(
    cluster: ServedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, document = "exact-zstd@16x2", ids(1)
    with monkeypatch.context() as hostile:
        hostile.setattr(kvstore_codec.codec, "period_layers_of", lambda *_: 4)
        store(cluster.address, name, document, tmp_path)
    with connect(cluster.address, accept=(name,)) as client:
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == []
        assert client.metrics.snapshot()["miss_bad_header"] == 1


@given(st.lists(st.sampled_from(NAMES), unique=True, min_size=1), st.sampled_from([None, *Rate]))
def test_a_floor_decides_for_named_rates_and_accept_for_the_others(
    accept: list[str], floor: Rate | None
) -> None:
    settings = ClientSettings(accept=tuple(accept), floor=floor)
    for name in NAMES:
        rate = Encoding.parse(name).rate
        if floor is None or not isinstance(rate, Rate):
            assert settings.encodings.accepts(name) == (name in accept)
        else:
            assert settings.encodings.accepts(name) == (list(Rate).index(rate) <= list(Rate).index(floor))
    assert not settings.encodings.accepts("nonsense")


def test_several_encodings_are_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ClientSettings(encoding="medium-raw, exact-zstd,medium-raw")
    assert ",".join(settings.encodings.stored) == "medium-raw,exact-zstd"
    assert settings.encodings.stored == ("medium-raw", "exact-zstd")
    assert settings.encodings.accept == ("medium-raw", "exact-zstd")
    assert ClientSettings(encoding="low-zstd,high-zstd").encodings.accept == (
        "low-zstd",
        "high-zstd",
        "exact-zstd",
    )
    monkeypatch.setenv("KVSTORE_FLOOR", "medium")
    monkeypatch.setenv("KVSTORE_ENCODING", "exact-zstd,medium-raw")
    assert ClientSettings().encodings.floor is Rate.MEDIUM
    assert ClientSettings().encodings.stored == ("exact-zstd", "medium-raw")
    monkeypatch.setenv("KVSTORE_FLOOR", "")
    assert ClientSettings().encodings.floor is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "exact-zstd,medum-raw"}, "no encoding 'medum-raw'"),
        ({"encoding": " , "}, "need an encoding"),
        ({"accept": "exact-zstd,medum-raw"}, "no encoding 'medum-raw'"),
        ({"floor": "fine"}, "'exact', 'high', 'medium' or 'low'"),
    ],
)
def test_unknown_names_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClientSettings(**settings)  # type: ignore[arg-type]


def test_chunks_are_stored_in_every_encoding(cluster: ServedCluster) -> None:
    document = ids(3)
    gathered: list[int] = []

    def gather(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        gathered.append(index)
        return random_kv(index)

    with connect(cluster.address, encoding="medium-raw,exact-zstd,low-zstd") as client:
        new = [NewChunk(chunk_id, partial(gather, index)) for index, chunk_id in enumerate(document)]
        assert client.store.put(SPEC, new).result(20) == 3
        assert gathered == [0, 1, 2]
        assert client.metrics.snapshot()["chunks_stored"] == 3
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == [["exact-zstd", "medium-raw", "low-zstd"]] * 3
        assert client.metrics.snapshot()["bytes_out"] == sum(
            variant.header.size_bytes for chunk in match.chunks for variant in chunk.variants
        )
    with connect(cluster.address, fetch_policy="fixed", accept=("low-zstd", "exact-zstd")) as client:
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == [["low-zstd", "exact-zstd"]] * 3
    assert cluster.stored_chunks() == 9
    cluster.check_nothing_is_held()


def test_what_was_computed_behind_lossy_kv_is_not_stored_as_more_faithful(cluster: ServedCluster) -> None:
    document = ids(2)
    with connect(cluster.address, encoding="exact-zstd,high-zstd,low-raw", floor="low") as client:
        store = client.store
        assert store.encodings_behind([]) == store.encodings
        assert store.encodings_behind([Encoding.parse("exact-raw")]) == store.encodings
        behind = store.encodings_behind({Encoding.parse("exact-zstd"), Encoding.parse("medium-zstd")})
        assert [encoding.name for encoding in behind] == ["low-raw"]
        assert put(client, document, encodings=behind) == 2
        assert put(client, document, encodings=()) == 0
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == [["low-raw"]] * 2


def test_an_encoding_without_its_calibration_stops_no_other(cluster: ServedCluster, tmp_path: Path) -> None:
    document = ids(2)
    encoding = "medium-klt-pco,exact-zstd"
    with connect(cluster.address, encoding=encoding, cache_dir=tmp_path) as client:
        assert client.store.needs_features
        assert put(client, document) == 2
        assert client.metrics.snapshot()["miss_store_no_calibration"] == 1
        match = client.match(SPEC, document)
        client.release(match)
        assert offered(match) == [["exact-zstd"]] * 2


def test_chunks_stored_in_fewer_encodings_than_wanted_are_stored(tmp_path: Path) -> None:
    """A node that is too small for one of them."""
    document = ids(1)
    with (
        served_cluster(tmp_path, memory_bytes=128 << 10) as small,
        connect(small.address, encoding="exact-raw,low-zstd") as client,
    ):
        assert put(client, document) == 1
        assert client.metrics.snapshot()["miss_store_too_large"] == 1
        assert client.metrics.snapshot()["chunks_stored"] == 1


def test_the_owner_that_has_more_is_not_asked_when_the_first_has_some(tmp_path: Path) -> None:
    """Whoever answers with something usable is the one that is read; nobody waits for a better offer."""
    document = ids(2)
    with served_cluster(tmp_path, nodes=2, replicas=2) as cluster:
        store(cluster.address, "exact-zstd", document, tmp_path)
        store(cluster.address, "medium-raw", document, tmp_path)
        with connect(cluster.address, accept=("exact-zstd", "medium-raw")) as client:
            match = client.match(SPEC, document)
            client.release(match)
            assert offered(match) == [["exact-zstd", "medium-raw"]] * 2
            assert sum(node.stats().counters["lookups"] for node in cluster.nodes) == len(match.leases)


def put_on(node: StorageNode, header: ChunkHeader, parts: Sequence[bytes]) -> None:
    pending = node.begin_put(header.chunk_id, header.encoding.name, header.size_bytes, header.calibration)
    assert pending is not None
    for part in parts:
        pending.write(memoryview(part))
    assert pending.commit()


@pytest.mark.parametrize("has_exact", [0, 1])
def test_another_owner_is_asked_when_the_first_has_only_what_cannot_be_decoded_yet(
    tmp_path: Path, has_exact: int
) -> None:
    (chunk_id,) = ids(1)
    klt = Encoding.parse("medium-klt-pco")
    geometry = chunk_geometry(SPEC, CHUNK_TOKENS, klt)
    frames = [b"frame"] * geometry.frame_count
    coded, coded_header = write_header(SPEC.digest, chunk_id, klt, geometry, frames, bytes(32))
    exact = encoded_chunk(chunk_id)
    with served_cluster(tmp_path, nodes=2, replicas=2) as cluster:
        for node in cluster.nodes:
            put_on(node, coded, [coded_header, *frames])
        settings: dict[str, Any] = {"encoding": klt.name, "cache_dir": tmp_path}
        with connect(cluster.address, **settings) as client:
            assert client.match(SPEC, [chunk_id]).chunks == ()
            assert client.metrics.snapshot()["miss_calibration_loading"] == 1
        put_on(cluster.nodes[has_exact], exact.header, [bytes(part) for part in exact.parts])
        with connect(cluster.address, **settings) as client:
            match = client.match(SPEC, [chunk_id])
            client.release(match)
            assert offered(match) == [["exact-zstd"]]
            assert match.chunks[0].member.node_id == f"node-{has_exact}"
            assert "miss_calibration_loading" not in client.metrics.snapshot()


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 0.0),
        ({"floor": "medium"}, 0.02),
        ({"floor": "exact", "encoding": "low-zstd"}, 0.0),
        ({"encoding": "exact-zstd,low-zstd"}, 0.06),
        ({"accept": "step0.5-zstd,high-zstd"}, 0.005),
    ],
)
def test_the_floor_or_else_what_is_accepted_limits_the_loss(settings: dict[str, str], loss: float) -> None:
    assert ClientSettings(**settings).encodings.loss == loss
