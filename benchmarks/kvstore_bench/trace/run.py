"""Runs the trace benchmark."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from kvstore_bench.trace.nodes import NodeReplay
from kvstore_bench.trace.optimum import optimal_hit_rate
from kvstore_bench.trace.oracle import beginnings_hit_rate
from kvstore_bench.trace.placement import WEIGHTS, balance_row, movement_row
from kvstore_bench.trace.replay import replay
from kvstore_bench.trace.trace import Trace, read_trace
from kvstore_bench.trace.workloads import texts_beyond_memory, workloads
from kvstore_cluster.eviction import POLICIES
from kvstore_codec.errors import ConfigurationError

Rows = list[dict[str, Any]]

_QUICK_REQUESTS = 2000
_OTHER_CAPACITIES = (0.01, 0.05, 0.2)


class Progress(Protocol):
    def advance(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the benchmark. `capacities` are shares of the trace's distinct blocks. `quick` replays only the first
    2,000 prompts."""

    trace: Path
    capacities: tuple[float, ...]
    policies: tuple[str, ...]
    nodes: tuple[int, ...]
    quick: bool = False
    through_nodes: bool = False
    """Whether to replay through real storage nodes instead of policies only. This is much slower."""

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise ConfigurationError(f"there is no policy {name!r}; policies are {', '.join(POLICIES)}")
        for fraction in self.capacities:
            if not 0 < fraction <= 1:
                raise ConfigurationError(
                    f"a capacity of {fraction:.0%} of the trace's blocks is not above 0 and at most 100 %"
                )
        for count in self.nodes:
            if count < 2:
                raise ConfigurationError(f"balance and movement need two or more nodes, not {count}")
        if not self.policies or not self.capacities:
            raise ConfigurationError("name at least one policy and one capacity")


@dataclass(frozen=True, slots=True)
class Result:
    rows: Rows
    other_workloads: Rows
    through_nodes: Rows
    balance: Rows
    movement: Rows
    meta: dict[str, Any]


def run(options: Options, progress: Progress) -> Result:
    """Runs the benchmark. Raises ConfigurationError for a trace that cannot be read."""
    trace = read_trace(options.trace)
    if options.quick:
        trace = Trace(trace.name, trace.requests[:_QUICK_REQUESTS])
    blocks = trace.footprint()
    through = [trace, texts_beyond_memory()] if options.through_nodes else []
    others = [] if options.quick else list(workloads(trace))
    return Result(
        rows=_hit_rates([trace], options.policies, options.capacities, progress, "replay"),
        other_workloads=_hit_rates(others, options.policies, _OTHER_CAPACITIES, progress, "others"),
        through_nodes=_through_nodes(through, options.policies, options.capacities, progress),
        **_placed(trace, options.nodes, progress),
        meta={
            "trace": trace.name,
            "requests": len(trace.requests),
            "references": trace.references,
            "distinct_chunks": len(blocks),
            "infinite_hit_rate": 1 - len(blocks) / trace.references,
        },
    )


def _hit_rates(
    traces: Sequence[Trace],
    policies: Sequence[str],
    capacities: Sequence[float],
    progress: Progress,
    stage: str,
) -> Rows:
    rows: Rows = []
    total = (len(policies) + 1) * len(capacities) * sum(len(trace.requests) for trace in traces)
    done = 0

    def advance(requests: int) -> None:
        nonlocal done
        done += requests
        progress.advance(stage, done, total)

    for trace in traces:
        blocks = trace.footprint()
        identities = {block: int.from_bytes(content_id(block)[:8], "little") for block in blocks}
        for fraction in capacities:
            chunks = max(1, int(fraction * len(blocks)))
            optimal = optimal_hit_rate(trace.requests, chunks)
            advance(len(trace.requests))
            for name in policies:
                rate = replay(trace.requests, POLICIES[name](), chunks, identities, advance)
                rows.append(
                    {
                        "workload": trace.name,
                        "policy": name,
                        "capacity_fraction": fraction,
                        "capacity_chunks": chunks,
                        "hit_rate": rate.blocks,
                        "prefix_hit_rate": rate.prefix,
                        "optimal_hit_rate": optimal,
                    }
                )
    return rows


def _through_nodes(
    traces: Sequence[Trace], policies: Sequence[str], capacities: Sequence[float], progress: Progress
) -> Rows:
    """Hit rates of one node, with clients that know texts and with clients that do not, and of three nodes with clients
    that know texts."""
    rows: Rows = []
    setups = ((1, False), (1, True), (3, True))
    total = len(policies) * len(capacities) * len(setups) * sum(len(trace.requests) for trace in traces)
    done = 0

    def advance(requests: int) -> None:
        nonlocal done
        done += requests
        progress.advance("nodes", done, total)

    for trace in traces:
        content_ids = {block: content_id(block) for block in trace.footprint()}
        for fraction in capacities:
            chunks = max(1, int(fraction * len(content_ids)))
            optimal = optimal_hit_rate(trace.requests, chunks)
            beginnings = beginnings_hit_rate(trace.requests, chunks)
            for name, (nodes, knows_texts) in product(policies, setups):
                replay = NodeReplay(POLICIES[name], chunks, content_ids, nodes=nodes, knows_texts=knows_texts)
                found = replay.run(trace.requests, advance)
                rows.append(
                    {
                        "workload": trace.name,
                        "policy": name,
                        "nodes": nodes,
                        "clients": "know texts" if knows_texts else "know chunks",
                        "capacity_fraction": fraction,
                        "capacity_chunks": chunks,
                        "prefix_hit_rate": found.prefix,
                        "counted_hit_rate": found.hits,
                        "puts": found.puts,
                        "beginnings_hit_rate": beginnings,
                        "optimal_hit_rate": optimal,
                    }
                )
    return rows


def _placed(trace: Trace, nodes: Sequence[int], progress: Progress) -> dict[str, Rows]:
    content_ids = {block: content_id(block) for block in sorted(trace.footprint())}
    uses = Counter(chain.from_iterable(trace.requests))
    balance: Rows = []
    movement: Rows = []
    for done, count in enumerate(nodes, 1):
        balance += [balance_row(count, weights, content_ids, uses) for weights in WEIGHTS]
        movement.append(movement_row(count, list(content_ids.values())))
        progress.advance("placement", done, len(nodes))
    return {"balance": balance, "movement": movement}


def content_id(block: int) -> bytes:
    """A content_id for a block: 32 uniformly distributed bytes."""
    return blake3(block.to_bytes(8, "little")).digest()
