"""A worker with a signing key uses no chunk that somebody without the key has stored, and replaces it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import xxhash

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.new_chunk import NewChunk
from kvstore_client.pages import PageNamespace
from kvstore_client.signatures import Signatures
from kvstore_cluster.node import StorageNode
from kvstore_codec.chunk import read_header
from kvstore_codec.errors import ConfigurationError, MatchFormatError
from kvstore_codec.identity import ChunkId
from kvstore_codec.payload import OPENING_BYTES
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model
from tests.clock import Clock

A, B = b"a1" * 32, b"b2" * 32
DOCUMENT = ids(3)
HONEST, POISON = 0, 100


def key_file(folder: Path, *keys: bytes) -> Path:
    path = folder / f"{keys[0][:2].decode()}-{len(keys)}.key"
    path.write_bytes(b"# keys of a tenant\n" + b"\n".join(keys) + b"\n")
    return path


def put(client: KVStoreClient, document: Sequence[ChunkId] = DOCUMENT, seed: int = HONEST) -> int:
    chunks = [NewChunk(name, lambda i=i: random_kv(seed + i)) for i, name in enumerate(document)]  # type: ignore[misc]
    return client.store.put(SPEC, chunks).result(timeout=60)


def fetched(client: KVStoreClient, seed: int = HONEST) -> int:
    """Number of chunks that the client finds and gets, each as it was put with this seed."""
    match = client.match(SPEC, DOCUMENT)
    if not match.chunks:
        return 0
    buffers = client.buffers.acquire(SPEC, match.tokens)
    assert client.fetch(match, buffers, None).wait().complete
    for index in range(len(match.chunks)):
        keys, values = random_kv(seed + index)
        tokens = slice(256 * index, 256 * (index + 1))
        assert torch.equal(buffers.keys[:, :, tokens], keys)
        assert torch.equal(buffers.values[:, :, tokens], values)
    client.buffers.release(buffers)
    return len(match.chunks)


def counted(client: KVStoreClient, name: str) -> int:
    return client.metrics.snapshot().get(name, 0)


@pytest.mark.parametrize("durability", ["memory", "durable"])
@pytest.mark.parametrize("bulk", [False, True], ids=["grpc", "bulk"])
def test_a_poisoned_chunk_is_refused_and_healed(tmp_path: Path, bulk: bool, durability: str) -> None:
    key = key_file(tmp_path, A)
    with (
        served_cluster(tmp_path, bulk=bulk, disk_bytes=64 << 20) as cluster,
        connect(cluster.address, put_durability=durability) as stranger,
        connect(cluster.address, signing_key_file=key, put_durability=durability) as worker,
        connect(cluster.address, signing_key_file=key) as other,
    ):
        assert put(stranger, seed=POISON) == 3
        assert fetched(stranger, POISON) == 3, "who has no key believes it"
        match = worker.match(SPEC, DOCUMENT)
        assert not match.chunks
        assert match.why_not is not None
        assert match.why_not.startswith("unsigned")
        assert counted(worker, "miss_unsigned") == 3
        # The honest worker computes, and replaces what it has refused.
        assert put(worker) == 3
        assert [fetched(client) for client in (worker, other, stranger)] == [3, 3, 3]
        # Nobody without a refusal replaces anything.
        assert put(stranger, seed=POISON) == 3
        assert put(other, seed=POISON) == 3
        assert fetched(worker) == 3
        cluster.check_nothing_is_held()
        assert cluster.stored_chunks() == 3


def test_a_refusal_replaces_only_what_was_refused(tmp_path: Path) -> None:
    """Two workers refuse the same chunk; the second one comes when the first has replaced it."""
    key = key_file(tmp_path, A)
    with (
        served_cluster(tmp_path) as cluster,
        connect(cluster.address) as stranger,
        connect(cluster.address, signing_key_file=key) as first,
        connect(cluster.address, signing_key_file=key) as second,
    ):
        assert put(stranger, seed=POISON) == 3
        assert [fetched(first), fetched(second)] == [0, 0]
        assert put(first) == 3
        puts = cluster.nodes[0].stats().counters["puts"]
        assert put(second) == 3
        assert cluster.nodes[0].stats().counters["puts"] == puts
        assert fetched(second) == 3


def test_keys_are_rotated_without_a_miss(tmp_path: Path) -> None:
    only_a, a_b, b_a, only_b = (key_file(tmp_path, *keys) for keys in ((A,), (A, B), (B, A), (B,)))
    with served_cluster(tmp_path) as cluster:
        for writes, reads in ((only_a, (a_b, b_a)), (b_a, (a_b, only_b))):
            with connect(cluster.address, signing_key_file=writes) as writer:
                cluster.nodes[0].delete(DOCUMENT)
                assert put(writer) == 3
            for path in reads:
                with connect(cluster.address, signing_key_file=path) as reader:
                    assert fetched(reader) == 3
        with connect(cluster.address, signing_key_file=only_a) as stale:
            assert fetched(stale) == 0
            assert counted(stale, "miss_bad_signature") == 3


def test_a_match_of_another_process_is_checked_too(tmp_path: Path) -> None:
    key = key_file(tmp_path, A)
    with (
        served_cluster(tmp_path) as cluster,
        connect(cluster.address) as stranger,
        connect(cluster.address, signing_key_file=key) as worker,
        connect(cluster.address, signing_key_file=key) as other,
    ):
        assert put(stranger, seed=POISON) == 3
        match = stranger.match(SPEC, DOCUMENT)
        with pytest.raises(MatchFormatError, match="not signed"):
            worker.match_from_bytes(SPEC, match.to_bytes())
        stranger.release(match)
        assert put(worker) == 3, "and has refused it"
        found = worker.match(SPEC, DOCUMENT)
        read = other.match_from_bytes(SPEC, found.to_bytes())
        assert read == found
        assert all(chunk.header.is_verified for chunk in read.chunks)
        other.release(read)
        cluster.check_nothing_is_held()


def whole(node: StorageNode) -> tuple[ChunkId, str, bytes]:
    (variant,) = node.list()[0]
    with node.open(variant.chunk_id, variant.encoding) as reader:
        return (
            variant.chunk_id,
            variant.encoding,
            b"".join(view for piece in reader.pieces(0, 0, 1 << 20) for view in piece),
        )


@pytest.mark.parametrize("bulk", [False, True], ids=["grpc", "bulk"])
def test_other_bytes_under_a_signed_header_are_refused_and_healed(tmp_path: Path, bulk: bool) -> None:
    """Checksums find damage, not attacks: see tests/codec/test_signing.py for how the two frames get the same one."""
    page = bytearray(200 - OPENING_BYTES)
    page[16 - OPENING_BYTES : 24 - OPENING_BYTES] = bytes.fromhex("ded46de9839097db")
    with (
        served_cluster(tmp_path, bulk=bulk) as cluster,
        connect(cluster.address, signing_key_file=key_file(tmp_path, A)) as worker,
    ):
        store = worker.pages(PageNamespace(b"model", "layout"))
        assert store.put([b"key"], [page]).ok == (True,)
        node = cluster.nodes[0]
        name, encoding, chunk = whole(node)
        start = read_header(chunk).header_bytes
        forged = bytearray(chunk)
        forged[start + 24 : start + 32] = b"poisoned"
        assert xxhash.xxh3_64_intdigest(forged[start:]) == read_header(chunk).frame_checksums[0]
        node.delete([name])
        pending = node.begin_put(name, encoding, len(forged))
        assert pending is not None
        pending.write(forged)
        assert pending.commit(), "a node cannot tell"
        view = bytearray(len(page))
        assert store.get_into([b"key"], [view]).reasons == {"bad_signature": 1}
        assert counted(worker, "miss_bad_signature") == 1
        assert store.put([b"key"], [page]).ok == (True,)
        assert store.get_into([b"key"], [view]).ok == (True,)
        assert view == page


def test_unsigned_pages_are_refused_and_healed(tmp_path: Path) -> None:
    with (
        served_cluster(tmp_path) as cluster,
        connect(cluster.address) as stranger,
        connect(cluster.address, signing_key_file=key_file(tmp_path, A)) as worker,
    ):
        namespace = PageNamespace(b"model", "layout")
        assert stranger.pages(namespace).put([b"key"], [b"poison"]).ok == (True,)
        store, view = worker.pages(namespace), bytearray(6)
        assert store.exists([b"key"]) == 0
        assert store.get_into([b"key"], [view]).ok == (False,)
        assert counted(worker, "miss_unsigned") == 2
        assert store.put([b"key"], [b"honest"]).ok == (True,)
        assert store.get_into([b"key"], [view]).ok == (True,)
        assert bytes(view) == b"honest"


def test_an_engine_answers_as_if_nothing_was_stored_and_reuses_its_own_afterwards(
    cluster: ServedCluster, tmp_path: Path, one_thread: None
) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 6}
    prompt = random_prompt(530)
    key = key_file(tmp_path, A)
    with connect(cluster.address) as stranger, connect(cluster.address, signing_key_file=key) as client:
        model = tiny_model()
        cached = CachedModel(model, client)
        expected = model.generate(prompt, **greedy)
        shape = (cached.spec.layers, cached.spec.kv_heads, 256, cached.spec.head_dim)

        def lies() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = 9 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
            return keys.to(cached.spec.dtype.torch), values.to(cached.spec.dtype.torch)

        names = client.chunk_ids(cached.spec, prompt[0].tolist())
        stored = stranger.store.put(cached.spec, [NewChunk(name, lies) for name in names])
        assert stored.result(timeout=60) == 2
        for reused_tokens in (0, 512):
            assert torch.equal(cached.generate(prompt, **greedy), expected)
            assert cached.last_report.reused_tokens == reused_tokens
            client.store.flush()
        assert counted(client, "miss_unsigned") == 2
        cached.close()
    cluster.check_nothing_is_held()


@pytest.mark.parametrize(
    "content",
    [b"", b"# only\n", b"zz" * 32, b"a1" * 31, A + b" " + A, b"\n".join([A] * 17), b"\n" * 5000 + A],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "signing.key"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="signing keys") as raised:
        connect("127.0.0.1:1", signing_key_file=path)
    assert "a1a1" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="cannot read the signing keys"):
        connect("127.0.0.1:1", signing_key_file=tmp_path / "missing")


def test_a_changed_file_takes_effect_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = key_file(tmp_path, A), Clock()
    signatures = Signatures(path, clock)
    first = signatures.keys

    def written(content: bytes) -> None:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
        clock.now_s += 2

    written(b"broken")
    assert signatures.keys is first
    clock.now_s += 2
    assert signatures.keys is first
    assert len(caplog.records) == 1
    written(B)
    second = signatures.keys
    assert second is not None
    assert second is not first
    assert second.sign(b"x") != (first.sign(b"x") if first is not None else b"")
