"""Stored chunks whose checksums are all right, and of which one frame decodes to other samples than were encoded: a
broken or hostile writer made them. What such a frame leaves in the engine's buffers reaches nobody."""

from pathlib import Path

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_cluster.node import StorageNode
from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.codec import encode_chunk
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import served_cluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def replace_last_frame(node: StorageNode, header: ChunkHeader, spec: ModelSpec) -> None:
    """The frame of other KV, with a checksum of its samples that is wrong in one bit."""
    chunk_id, encoding, geometry = header.chunk_id, header.encoding, header.geometry
    with node.open(chunk_id, encoding.name) as reader:
        stored = b"".join(view for piece in reader.pieces(0, 0, 1 << 20) for view in piece)
    shape = geometry.layers, geometry.kv_heads, geometry.tokens, geometry.head_dim
    keys, values = 9 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(spec.dtype.torch)
    frame = bytearray(encode_chunk(keys, values, spec=spec, chunk_id=chunk_id, encoding=encoding).parts[-1])
    frame[1] ^= 1
    frames = [
        stored[header.frame_offset(index) : header.frame_offset(index + 1)]
        for index in range(geometry.frame_count - 1)
    ]
    _, first = write_header(
        header.model_digest, chunk_id, encoding, geometry, [*frames, frame], token_order=header.token_order
    )
    hostile = b"".join([first, *frames, frame])
    node.delete([chunk_id])
    put = node.begin_put(chunk_id, encoding.name, len(hostile))
    assert put is not None
    put.write(hostile)
    assert put.commit(), "the node verifies checksums, and they are right"


@pytest.mark.parametrize("encoding", ["exact-zstd", "exact-raw"])
def test_a_frame_with_other_samples_makes_its_chunk_missing_and_reaches_nobody(
    tmp_path: Path, encoding: str, one_thread: None
) -> None:
    prompt = random_prompt(256 * 4 + 20)
    with served_cluster(tmp_path) as cluster:
        with connect(cluster.address, encoding=encoding) as writer:
            model = CachedModel(tiny_model(), writer)
            expected = model.generate(prompt, **GREEDY)
            writer.store.flush()
        node = cluster.nodes[0]
        with connect(cluster.address, accept=(encoding,)) as client:
            cached = CachedModel(tiny_model(), client)
            assert torch.equal(cached.generate(prompt, **GREEDY), expected), "fills the client's buffers"
            assert cached.last_report.reused_tokens == 256 * 4
            for chunk in cached_chunks(node):
                replace_last_frame(node, chunk, cached.spec)
            assert torch.equal(cached.generate(prompt, **GREEDY), expected)
            report = cached.last_report.fetch
            assert report is not None
            assert set(report.missing.values()) == {"undecodable"}
            assert client.metrics.snapshot()["miss_undecodable"] >= 1
        cluster.check_nothing_is_held()


def cached_chunks(node: StorageNode) -> list[ChunkHeader]:
    headers = []
    for variant in node.list()[0]:
        with node.open(variant.chunk_id, variant.encoding) as reader:
            headers.append(reader.header)
    return headers[:2]
