"""The state of a cluster as people read it: by `kvstore top`, on the status page and in reports."""

from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from enum import StrEnum

from kvstore_api.v1 import kvstore_pb2 as pb

_MOST_NAMES = 3


class Health(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. Rates are since the observation before; None without one."""

    node_id: str
    endpoint: str
    state: str
    """up, draining or down."""
    problem: str
    """A sentence, or empty."""
    chunks: int
    memory_bytes: tuple[int, int]
    """Used, and limit."""
    disk_bytes: tuple[int, int]
    hit_rate: float | None
    in_Bps: float | None  # noqa: N815 (bytes, not bits)
    out_Bps: float | None  # noqa: N815
    evictions_per_s: float | None
    repair_left: int


@dataclass(frozen=True, slots=True)
class TenantView:
    """One tenant, or `*` for those that nodes do not report one by one."""

    name: str
    stored_bytes: int
    limit_bytes: int
    """Its quota, as far as it is divided among nodes that answer; 0: none."""
    hit_rate: float | None
    """Since its nodes started."""


@dataclass(frozen=True, slots=True)
class Overview:
    health: Health
    sentence: str
    epoch: int
    nodes: tuple[NodeView, ...]
    tenants: tuple[TenantView, ...]
    """Those with the most bytes first."""
    stored_bytes: Mapping[tuple[str, str], int]
    """By tier and encoding."""
    hit_rate: float | None
    """Of all nodes, in chunks; None while nothing is looked up."""
    in_Bps: float | None  # noqa: N815
    out_Bps: float | None  # noqa: N815


class Observer:
    """Turns answers of the coordinator into overviews, with rates from one answer to the next. For one thread."""

    def __init__(self) -> None:
        self._before: dict[str, Mapping[str, int]] = {}
        self._before_s: float | None = None

    def observe(self, reply: pb.ClusterStatsReply, now_s: float) -> Overview:
        """The overview of an answer that came at `now_s` of a monotonic clock."""
        span_s = None if self._before_s is None else max(now_s - self._before_s, 1e-3)
        grown = {node.member.node_id: self._growth(node) for node in reply.nodes if node.HasField("stats")}
        nodes = tuple(_node(node, grown.get(node.member.node_id), span_s) for node in reply.nodes)
        total: Counter[str] = Counter()
        for growth in grown.values():
            total.update(growth)
        health, sentence = health_of(reply)
        overview = Overview(
            health,
            sentence,
            reply.epoch,
            nodes,
            _tenants(reply),
            _stored(reply),
            _hit_rate(total),
            total["bytes_in"] / span_s if span_s else None,
            total["bytes_out"] / span_s if span_s else None,
        )
        self._before = {node.member.node_id: dict(node.stats.counters) for node in reply.nodes}
        self._before_s = now_s
        return overview

    def _growth(self, node: pb.NodeStatus) -> Counter[str]:
        """How much each counter grew. Before the first answer, and after a restart of the node, it counts from 0."""
        before = self._before.get(node.member.node_id, {})
        if any(node.stats.counters.get(name, 0) < count for name, count in before.items()):
            before = {}
        return Counter({name: count - before.get(name, 0) for name, count in node.stats.counters.items()})


def health_of(reply: pb.ClusterStatsReply) -> tuple[Health, str]:
    """How well the cluster is, in one sentence."""
    nodes = list(reply.nodes)
    down = [node.member.node_id for node in nodes if not node.HasField("stats")]
    troubled = [node.member.node_id for node in nodes if _problem(node) and node.HasField("stats")]
    draining = [node.member.node_id for node in nodes if node.member.draining]
    left = sum(node.stats.gauges.get("repair_left", 0) for node in nodes)
    up = len(nodes) - len(down)
    if not nodes:
        return Health.BAD, "The cluster has no storage node, so nothing can be stored or reused."
    if not up:
        return (
            Health.BAD,
            f"None of {_count(nodes, 'storage node')} answers, so nothing can be stored or reused.",
        )
    parts = []
    if down:
        parts.append(f"{_names(down)} {_do(down, 'does', 'do')} not answer")
    if troubled:
        parts.append(f"{_names(troubled)} {_do(troubled, 'has', 'have')} trouble")
    if left:
        parts.append(f"{left} variants lack a replica")
    if parts:
        return Health.WARNING, f"{up} of {_count(nodes, 'storage node')} answer; {', '.join(parts)}."
    if draining:
        return Health.GOOD, f"All is well; {_names(draining)} {_do(draining, 'is', 'are')} being drained."
    return Health.GOOD, f"All is well: {_count(nodes, 'storage node')} {_do(nodes, 'answers', 'answer')}."


def _problem(node: pb.NodeStatus) -> str:
    if not node.HasField("stats"):
        return node.error or "does not answer"
    if node.stats.disk_error:
        return f"disk: {node.stats.disk_error}"
    gauges = node.stats.gauges
    if failing := gauges.get("background_failing", 0):
        return f"{failing} background loops fail; its log says why"
    if unreadable := gauges.get("disk_unreadable", 0):
        return f"{unreadable} chunks on its disk could not be read"
    return ""


def _node(node: pb.NodeStatus, grown: Counter[str] | None, span_s: float | None) -> NodeView:
    stats, gauges = node.stats, node.stats.gauges

    def rate(name: str) -> float | None:
        return None if grown is None or span_s is None else grown[name] / span_s

    state = "down" if grown is None else "draining" if node.member.draining else "up"
    return NodeView(
        node.member.node_id,
        node.member.endpoint,
        state,
        _problem(node),
        stats.chunks,
        (stats.bytes_used, stats.bytes_limit),
        (gauges.get("disk_bytes_used", 0), gauges.get("disk_bytes_limit", 0)),
        None if grown is None else _hit_rate(grown),
        rate("bytes_in"),
        rate("bytes_out"),
        rate("evictions"),
        gauges.get("repair_left", 0),
    )


def _hit_rate(grown: Mapping[str, int]) -> float | None:
    asked = sum(grown.get(name, 0) for name in ("hits", "misses", "unusable"))
    return grown.get("hits", 0) / asked if asked else None


def _tenants(reply: pb.ClusterStatsReply) -> tuple[TenantView, ...]:
    found: dict[str, Counter[str]] = {}
    for node in reply.nodes:
        for sample in node.stats.samples:
            if sample.name.startswith("tenant_") and sample.labels:
                found.setdefault(sample.labels[0], Counter())[sample.name] += sample.value
    views = [
        TenantView(
            name,
            told["tenant_bytes"],
            told["tenant_limit_bytes"],
            told["tenant_hits"] / told["tenant_requested_chunks"]
            if told["tenant_requested_chunks"]
            else None,
        )
        for name, told in found.items()
    ]
    return tuple(sorted(views, key=lambda view: (-view.stored_bytes, view.name)))


def _stored(reply: pb.ClusterStatsReply) -> dict[tuple[str, str], int]:
    stored: Counter[tuple[str, str]] = Counter()
    for node in reply.nodes:
        for sample in node.stats.samples:
            if sample.name == "stored_bytes" and len(sample.labels) == 2:
                stored[sample.labels[0], sample.labels[1]] += sample.value
    return {key: size for key, size in sorted(stored.items()) if size}


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else shown


def _do(of: Sized, one: str, many: str) -> str:
    return one if len(of) == 1 else many


def _count(of: Sized, noun: str) -> str:
    return f"{len(of)} {noun}{'' if len(of) == 1 else 's'}"
