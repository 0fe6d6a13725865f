"""`kvstore bench trace`: traces, replays, the optimum, placement, and the command."""

import json
from collections import Counter
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvstore_bench.trace.nodes import NodeHits, NodeReplay
from kvstore_bench.trace.optimum import optimal_hit_rate
from kvstore_bench.trace.oracle import BeginningsOracle, beginnings_hit_rate
from kvstore_bench.trace.placement import balance_row, movement_row
from kvstore_bench.trace.replay import HitRate, replay
from kvstore_bench.trace.run import content_id
from kvstore_bench.trace.trace import Blocks, Trace, read_trace
from kvstore_bench.trace.workloads import texts_beyond_memory, workloads
from kvstore_cluster.eviction import POLICIES
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.app import app

IDENTITIES = {block: (block + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for block in range(1000)}
CONTENT_IDS = {block: content_id(block) for block in range(40_000)}


def _write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def _request(timestamp: float, *blocks: int) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": 512, "output_length": 1, "hash_ids": list(blocks)}


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.jsonl", [_request(20, 1, 2), _request(10.5, 1, 3, 1), _request(20, 4)])
    trace = read_trace(path)
    assert trace.requests == ((1, 3), (1, 2), (4,))
    assert (trace.references, trace.footprint()) == (5, {1, 2, 3, 4})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"timestamp": 1, "hash_ids": [1', "line 3: not JSON"),
        ("[1, 2]", "line 3: not a JSON object"),
        ('{"hash_ids": [1]}', "line 3: the field 'timestamp' is missing"),
        ('{"timestamp": 1}', "line 3: the field 'hash_ids' is missing"),
        ('{"timestamp": "now", "hash_ids": [1]}', "line 3: 'timestamp' is not a number: 'now'"),
        ('{"timestamp": 1, "hash_ids": 7}', "line 3: 'hash_ids' is not a list"),
        ('{"timestamp": 1, "hash_ids": [1, "a"]}', "line 3: 'hash_ids' is not a list of integers"),
        ('{"timestamp": 1, "hash_ids": [true]}', "line 3: 'hash_ids' is not a list of integers"),
        ('{"timestamp": 1, "hash_ids": [-1]}', "line 3: 'hash_ids' is not a list of integers"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = _write(tmp_path / "t.jsonl", [_request(1, 1)])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ConfigurationError, match=complaint):
        read_trace(path)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the trace"):
        read_trace(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigurationError, match="has no blocks"):
        read_trace(tmp_path / "empty.jsonl")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        read_trace(tmp_path / "picture.png")


def test_a_prefix_hit_needs_all_blocks_before_it() -> None:
    # In three places: the third request evicts 1, so that the last finds 2 and 3 behind a gap.
    rate = replay([(1, 2, 3), (4,), (1, 2, 3)], POLICIES["lru"](), 3, IDENTITIES)
    assert rate == HitRate(blocks=2 / 7, prefix=0.0)
    rate = replay([(1, 2, 3), (1, 2, 4), (1, 2, 3)], POLICIES["lru"](), 4, IDENTITIES)
    assert rate == HitRate(blocks=5 / 9, prefix=5 / 9)


REQUESTS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True).map(tuple), min_size=1)


@given(requests=REQUESTS, capacity=st.integers(1, 14))
@settings(max_examples=150, deadline=None)
def test_no_policy_beats_the_optimum_and_all_meet_it_with_room_for_everything(
    requests: list[Blocks], capacity: int
) -> None:
    optimal = optimal_hit_rate(requests, capacity)
    for policy in POLICIES.values():
        rate = replay(requests, policy(), capacity, IDENTITIES)
        assert 0 <= rate.prefix <= rate.blocks <= optimal + 1e-12
        if capacity >= 13:
            assert rate.blocks == optimal


@given(
    requests=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple), min_size=1, max_size=6
    ),
    capacity=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_optimum_is_the_best_of_all_choices(requests: list[Blocks], capacity: int) -> None:
    @cache
    def best(kept: frozenset[int], time: int) -> int:
        if time == len(requests):
            return 0
        there = kept.union(requests[time])
        choices = combinations(there, min(capacity, len(there)))
        return len(kept.intersection(requests[time])) + max(
            best(frozenset(choice), time + 1) for choice in choices
        )

    expected = best(frozenset(), 0) / sum(map(len, requests))
    assert optimal_hit_rate(requests, capacity) == pytest.approx(expected)


def test_the_oracle_keeps_the_beginning_and_takes_room_from_the_end() -> None:
    oracle = BeginningsOracle(3)
    assert [oracle.ask((1, 2, 3, 4, 5)) for _ in range(2)] == [0, 3]
    assert [oracle.ask((1, 6)), oracle.ask((1, 2, 3)), oracle.ask((1, 6))] == [1, 2, 1]
    assert [oracle.ask((7, 8)), oracle.ask((1,))] == [0, 1]


TREES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=25).map(
    lambda texts: [
        tuple(int("1" + "".join(map(str, text[:end]))) for end in range(1, len(text) + 1)) for text in texts
    ]
)


@given(requests=TREES, capacity=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_a_node_under_lru_hits_what_the_oracle_hits(requests: list[Blocks], capacity: int) -> None:
    names = {block: content_id(block) for request in requests for block in request}
    found = NodeReplay(POLICIES["lru"], capacity, names).run(requests)
    assert found.prefix == found.hits == beginnings_hit_rate(requests, capacity)
    assert found.prefix <= optimal_hit_rate(requests, capacity) + 1e-12


def _replayed(policy: str, *, nodes: int = 1, knows_texts: bool = True) -> NodeHits:
    """The first texts beyond a memory of 60 blocks."""
    requests = _LONG
    names = {block: content_id(block) for request in requests for block in request}
    return NodeReplay(POLICIES[policy], 60, names, nodes=nodes, knows_texts=knows_texts).run(requests)


_LONG = [request[:150] for request in texts_beyond_memory().requests[:20]]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_of_texts_beyond_memory_prompts_find_what_an_oracle_would_keep(policy: str) -> None:
    found, before = _replayed(policy), _replayed(policy, knows_texts=False)
    assert found.hits == found.prefix >= 0.95 * beginnings_hit_rate(_LONG, 60)
    assert found.prefix > before.prefix
    assert found.puts < before.puts


def test_three_nodes_that_see_a_third_of_each_text_keep_beginnings_too() -> None:
    found, before = _replayed("value", nodes=3), _replayed("value", nodes=3, knows_texts=False)
    assert found.hits == found.prefix > before.prefix


def test_load_follows_weights_and_the_most_wanted_chunk_bounds_it() -> None:
    uses = Counter(dict.fromkeys(CONTENT_IDS, 1))
    for weights in ("equal", "1:2:4"):
        row = balance_row(10, weights, CONTENT_IDS, uses)
        assert 1 < row["chunks_max_over_mean"] < 1.1
        assert row["requests_max_over_mean"] == pytest.approx(row["chunks_max_over_mean"])
        assert row["requests_bound"] == 1
    row = balance_row(10, "equal", CONTENT_IDS, uses + Counter({7: 40_000}))
    assert row["requests_bound"] == pytest.approx(5, rel=1e-3)
    assert 5 <= row["requests_max_over_mean"] < 5.6


def test_only_the_share_of_who_comes_or_goes_moves() -> None:
    for nodes in (3, 30):
        row = movement_row(nodes, list(CONTENT_IDS.values()))
        assert row["joined_fraction_moved"] == pytest.approx(1 / (nodes + 1), rel=0.1)
        assert row["left_fraction_moved"] == pytest.approx(1 / nodes, rel=0.1)
        assert row["joined_fraction_moved"] <= row["bound"]


def test_other_workloads_are_what_they_say() -> None:
    made = {trace.name: trace for trace in workloads(Trace("t", ((1, 2), (3,), (1,), (4, 5))))}
    assert made["first half"].requests == ((1, 2), (3,))
    assert made["second half"].requests == ((1,), (4, 5))
    counts = Counter(block for (block,) in made["Zipf 0.9"].requests)
    assert counts[0] / counts[99] == pytest.approx(100**0.9, rel=0.2)
    assert len(made["Zipf 0.9, scans"].footprint()) > 200_000
    loop = made["loop"].requests
    assert loop[: len(loop) // 2] == loop[len(loop) // 2 :]


def _prompts() -> list[dict[str, Any]]:
    """Conversations of three turns behind one system prompt, and strangers between them."""
    return [
        _request(1000 * turn + talk, 0, *(10 * talk + block for block in range(1, 3 + 2 * turn)))
        for turn, talk in product(range(3), range(60))
    ] + [_request(1000 * turn + 500, *range(5000 + 100 * turn, 5060 + 100 * turn)) for turn in range(3)]


def _invoke(*arguments: str) -> str:
    return CliRunner().invoke(app, ["bench", "trace", *arguments], catch_exceptions=False).output


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = _write(tmp_path / "talks.jsonl", _prompts())
    files = ("--json", str(tmp_path / "out" / "trace.json"), "--plot", str(tmp_path / "trace.png"))
    printed = _invoke(str(trace), "--quick", "--capacity", "5%,20", "--nodes", "3,5", *files)
    assert "prefix hits" in printed
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert (result["meta"]["trace"], result["meta"]["requests"]) == ("talks", 183)
    assert [(row["policy"], row["capacity_fraction"]) for row in result["rows"]] == [
        (policy, fraction) for fraction in (0.05, 0.2) for policy in ("lru", "s3-fifo", "value")
    ]
    assert all(row["hit_rate"] <= row["optimal_hit_rate"] for row in result["rows"])
    assert [row["nodes"] for row in result["movement"]] == [3, 5]
    assert result["other_workloads"] == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policy", "lru,mru"), "no policy 'mru'; policies are lru"),
        (("--capacity", "a lot"), "'a lot' is not a capacity"),
        (("--capacity", "0%"), "not above 0 and at most 100 %"),
        (("--capacity", "nan"), "not above 0 and at most 100 %"),
        (("--nodes", "1"), "two or more"),
        (("--nodes", "three"), "'three' is not a number of nodes"),
        (("--policy", ""), "at least one policy"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    tmp_path: Path, arguments: tuple[str, str], complaint: str
) -> None:
    trace = _write(tmp_path / "talks.jsonl", _prompts())
    with pytest.raises(ConfigurationError, match=complaint):
        _invoke(str(trace), *arguments)
