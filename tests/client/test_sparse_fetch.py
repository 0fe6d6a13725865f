"""What the engine computes itself is not read: whole frames are left out of a fetch."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_bench.link.clients import connect_policy
from kvstore_client import KVStoreClient, connect
from kvstore_client.fetch import Computing, FetchReport
from kvstore_client.fetch.cut import cut, joined, slots_outside
from kvstore_client.fetch.wanted import WantedFrames
from kvstore_client.match import Match, StoredChunk
from kvstore_client.new_chunk import NewChunk
from kvstore_client.planning import Costs, PrefillCost, Profile
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import ChunkId
from tests.client.chunks import SPEC, ids, random_kv, stored_chunks
from tests.client.conftest import ServedCluster, served_cluster
from tests.codec.chunks import features_of, make_calibration

ENCODINGS = [
    "exact-raw",
    "exact-zstd",
    "exact-zstd@32",
    "exact-zstd@256",
    "high-zstd",
    "medium-raw@128",
    "medium-hevc-cpu",
    "low-hevc-cpu@128",
    "medium-klt-pco",
    "high-klt-zstd@128",
    "medium-klt-hevc-cpu",
    "low-klt-hevc-cpu-420",
]
GAP = 44
"""Tokens that stand before every chunk, and are no chunk's."""
CHUNKS = 3
TOKENS = CHUNKS * (GAP + 256)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with served_cluster(folder, nodes=2, bulk=True) as cluster:
        calibration = make_calibration(SPEC)
        with connect(cluster.address, cache_dir=folder) as client:
            client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)
        yield cluster


def text(seed: int) -> list[int]:
    return torch.randint(0, 1000, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


def stored_match(client: KVStoreClient, seed: int) -> Match:
    """Chunks with gaps between them, which are stored in another context."""
    segments = [GAP, 256] * CHUNKS
    chunks = client.segment_chunks(SPEC, text(seed), segments)
    new = []
    for index, chunk in enumerate(chunks):
        elsewhere = ChunkId(chunk.chunk_id.content_id, ids(1, seed + index)[0].prefix_id)
        new.append(NewChunk(elsewhere, lambda i=index: random_kv(i), features=lambda: features_of(256)))  # type: ignore[misc]
    assert client.store.put(SPEC, new).result(20) == CHUNKS
    match = client.match_segments(SPEC, chunks)
    assert [(chunk.first_token, chunk.exact) for chunk in match.chunks] == [
        (44, False),
        (344, False),
        (644, False),
    ]
    return match


def fetch(
    client: KVStoreClient, match: Match, computed: Sequence[range] = (), **options: Any
) -> tuple[FetchReport, torch.Tensor, torch.Tensor]:
    buffers = client.buffers.acquire(SPEC, TOKENS)
    buffers.keys.fill_(-1)
    buffers.values.fill_(-1)
    fetching = client.fetch(
        match, buffers, None, features=lambda _: features_of(256), computed=computed, **options
    )
    for layer in range(SPEC.layers):
        assert fetching.wait_layer(layer)
    report = fetching.wait()
    keys, values = buffers.keys.clone(), buffers.values.clone()
    client.buffers.release(buffers)
    return report, keys, values


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("pipelined", [True, False])
def test_frames_inside_what_is_computed_are_not_read(
    served: ServedCluster, tmp_path: Path, name: str, pipelined: bool
) -> None:
    # The first 32, then of the second chunk all but 64 in the middle, then an end that reaches into the gap.
    computed = [range(44, 76), range(344, 408), range(408, 480), range(536, 620), range(700, 901)]
    wanted_ranges = joined(computed)
    settings = {"encoding": name, "cache_dir": tmp_path, "pipelined": pipelined}
    with connect_policy(served.address, settings) as client:
        client.prepare(SPEC).result(20)
        match = stored_match(client, ENCODINGS.index(name) + 100 * pipelined)
        whole, all_keys, all_values = fetch(client, match)
        assert whole.complete, whole
        assert whole.received_bytes == sum(
            chunk.header.size_bytes - chunk.header.header_bytes for chunk in match.chunks
        )
        before = sum(node.stats().counters["bytes_out"] for node in served.nodes)
        report, keys, values = fetch(client, match, computed)
        assert report.complete, report
        assert (report.delivered, report.fetched) == (CHUNKS, CHUNKS)

        left_out = torch.zeros(TOKENS, dtype=torch.bool)
        wanted_bytes = 0
        for chunk in match.chunks:
            geometry = chunk.header.geometry
            for slot in range(geometry.frames_per_period):
                tokens = geometry.tokens_of(slot)
                first, end = chunk.first_token + tokens.start, chunk.first_token + tokens.stop
                if any(piece.start <= first and end <= piece.stop for piece in wanted_ranges):
                    left_out[first:end] = True
                    continue
                for period in range(geometry.periods):
                    frame = period * geometry.frames_per_period + slot
                    wanted_bytes += chunk.header.range_bytes(frame, 1)[1]
        assert report.received_bytes == wanted_bytes
        sent = sum(node.stats().counters["bytes_out"] for node in served.nodes) - before
        assert sent == wanted_bytes
        if "@256" not in name:
            assert left_out.any()
            assert wanted_bytes < whole.received_bytes
        for sparse, dense in ((keys, all_keys), (values, all_values)):
            assert (sparse[:, :, left_out] == -1).all(), "what the engine computes was written over"
            # Products over other numbers of tokens may round differently.
            error = 1e-5 if "klt" in name else 0.0
            torch.testing.assert_close(
                sparse[:, :, ~left_out], dense[:, :, ~left_out], rtol=error, atol=error
            )
    served.check_nothing_is_held()


def test_when_everything_is_computed_nothing_travels(served: ServedCluster) -> None:
    with connect(served.address) as client:
        match = stored_match(client, 1000)
        before = [node.stats().counters["bytes_out"] for node in served.nodes]
        report, keys, values = fetch(client, match, [range(40, 400), range(390, 9000)])
        assert report.complete
        assert (report.delivered, report.fetched, report.received_bytes) == (CHUNKS, CHUNKS, 0)
        assert (keys == -1).all()
        assert (values == -1).all()
        assert [node.stats().counters["bytes_out"] for node in served.nodes] == before
    served.check_nothing_is_held()


def test_a_plan_cannot_leave_out_part_of_a_chunk(served: ServedCluster) -> None:
    costs = Costs(Profile({}, PrefillCost(0.01, 4e-4, 1e-8), 1.0, 2, {"model": "m"}))
    with connect(served.address) as client:
        match = stored_match(client, 2000)
        with pytest.raises(ConfigurationError, match="computing"):
            fetch(client, match, [range(64)], computing=Computing(costs, TOKENS, 9))
        client.release(match)


ranges = st.lists(st.builds(range, st.integers(0, 600), st.integers(0, 600)), max_size=6)
CHUNK = stored_chunks(2)[1]


@settings(deadline=None)
@given(ranges)
def test_ranges_are_joined_to_the_same_positions(pieces: list[range]) -> None:
    found = joined(pieces)
    assert [position for piece in found for position in piece] == sorted(
        {p for piece in pieces for p in piece}
    )
    assert all(one.stop < other.start for one, other in pairwise(found))


@settings(deadline=None)
@given(ranges)
def test_every_frame_outside_is_read_once_and_no_other(pieces: list[range]) -> None:
    chunk: StoredChunk = CHUNK
    geometry = chunk.header.geometry
    computed = {position for piece in pieces for position in piece}
    outside = [
        slot
        for slot in range(geometry.frames_per_period)
        if not {chunk.first_token + token for token in geometry.tokens_of(slot)} <= computed
    ]
    slots = slots_outside(chunk, chunk.variants[0], joined(pieces))
    assert slots == outside
    frames: list[int] = []
    wanted = WantedFrames(chunk, joined(pieces))
    for task in cut(1, chunk, chunk.variants[0], wanted.slots):
        frames += range(task.first_frame, task.first_frame + task.frame_count)
        assert task.tokens.stop - task.tokens.start == 64 * task.frame_count
        assert task.tokens.start == 256 + 64 * (task.first_frame % geometry.frames_per_period)
    assert frames == [
        period * geometry.frames_per_period + slot for period in range(geometry.periods) for slot in outside
    ]
