"""Measures how evenly placement distributes a trace's chunks, and how many move when a node joins or leaves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from kvstore_api.placement import Member, Placement

# Capacities of the nodes, repeated in order.
WEIGHTS = {"equal": (1.0,), "1:2:4": (1.0, 2.0, 4.0)}


def members(count: int, weights: Sequence[float] = (1.0,)) -> list[Member]:
    return [
        Member(f"node-{number}", "", weight) for number, weight in enumerate(islice(cycle(weights), count))
    ]


def balance_row(
    nodes: int, weights: str, content_ids: Mapping[int, bytes], uses: Counter[int]
) -> dict[str, Any]:
    """The load of the fullest node divided by its share by weight, in chunks and in references to them. The chunk with
    the most references is on one node in every placement, so no placement is below `requests_bound`."""
    chosen = members(nodes, WEIGHTS[weights])
    numbers = {member.node_id: number for number, member in enumerate(chosen)}
    owners = Placement(chosen).owners(list(content_ids.values()))
    home = np.array([numbers[owner.node_id] for (owner,) in owners])
    counts = np.array([uses[block] for block in content_ids], float)
    shares = np.array([member.weight for member in chosen])
    shares /= shares.sum()
    requests = np.bincount(home, counts, nodes) / shares / counts.sum()
    return {
        "nodes": nodes,
        "weights": weights,
        "chunks_max_over_mean": float((np.bincount(home, minlength=nodes) / shares).max() / len(home)),
        "requests_max_over_mean": float(requests.max()),
        "requests_bound": float(max(1.0, counts.max() / counts.sum() / shares.max())),
    }


def movement_row(nodes: int, content_ids: Sequence[bytes]) -> dict[str, Any]:
    """The share of chunks whose owner changes when a node joins `nodes` nodes, and when one of them leaves. A placement
    that stays even moves at least 1 / (nodes + 1), or 1 / nodes."""
    now = members(nodes)
    before = Placement(now).owners(content_ids)
    joined = Placement(members(nodes + 1)).owners(content_ids)
    left = Placement(now[:-1]).owners(content_ids)
    return {
        "nodes": nodes,
        "joined_fraction_moved": sum(map(_differ, before, joined)) / len(content_ids),
        "left_fraction_moved": sum(map(_differ, before, left)) / len(content_ids),
        "bound": 1.1 / nodes,
    }


def _differ(before: Sequence[Member], after: Sequence[Member]) -> bool:
    return before[0].node_id != after[0].node_id
