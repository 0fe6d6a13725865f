"""Plans one fetch before it starts, and replans it while conditions change."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvstore_client.fetch.chunk_state import ChunkState
from kvstore_client.metrics import ClientMetrics
from kvstore_client.planning import (
    COMPUTE,
    ChunkWork,
    Costs,
    DEFAULT_BANDWIDTH_Bps,
    LEAST_BUSY_Bps,
    Links,
    Option,
    Order,
    Plan,
    Planner,
    Race,
    Work,
)
from kvstore_client.planning.predict import predict
from kvstore_client.timeline import Timeline

log = logging.getLogger(__name__)

# A new plan must take less than this share of the old plan's time, because work in progress has been paid for.
_WORTH_A_CHANGE = 0.9
# Change in bandwidth, as a factor or its inverse, that triggers a new plan.
_MOVED = 1.5
_SHORTEST_INTERVAL_S = 0.02
# A computing engine does not stop a link.
_LEAST_BUSY_SHARE = 0.1
# Planning thousands of chunks takes a while, and delays the fetch.
_MOST_PLANNING = 0.1


@dataclass(frozen=True, slots=True)
class Computing:
    """Work of the engine for a prompt, with and without the service."""

    costs: Costs
    """Costs of the model."""
    suffix_first: int
    """Position of the first token behind the match."""
    suffix_tokens: int
    """Number of tokens that the engine computes in any case."""
    waits: bool = False
    """Whether the engine computes nothing until the fetch has ended, and then everything behind the leading chunks that
    have arrived. Chunks are then read one after the other, the first one first."""
    race: Race | None = None
    """With `waits`: the fetch ends as soon as the engine had better compute."""


class Replanner:
    """Runs the planner and applies its plans to the chunks. The caller holds the fetch's lock."""

    def __init__(
        self,
        planner: Planner,
        links: Links,
        computing: Computing,
        timeline: Timeline,
        metrics: ClientMetrics,
        *,
        replan: bool,
    ) -> None:
        self._planner, self._links, self._computing = planner, links, computing
        self._timeline, self._metrics = timeline, metrics
        self.replan = replan
        self._reckoned_Bps: dict[str, float] = {}
        self._began_s = time.monotonic()
        self._rest_until_s = 0.0
        self._ends_at_s = 0.0
        self._busy_until_s = 0.0
        self.predicted_fetch_s: float | None = None
        """Seconds that the fetch was to take by its first plan. None as long as there is none."""
        self.order: Order = "layers"
        self.replans = 0

    def begin(self, states: Sequence[ChunkState]) -> bool:
        """Apply the first plan; False when no plan can be made."""
        try:
            with self._timeline.span("plan"):
                work, variants = self._work(states)
                plan = self._planner.plan(work)
                self._adopt(plan, states, variants)
                self.predicted_fetch_s = plan.fetch_s
        except Exception:  # a bug in a planner must not reach the engine
            log.exception("a fetch could not be planned")
            self.replan = False
            return False
        self._mark("plan", states)
        return True

    def adjust(self, states: Sequence[ChunkState], *, idle: bool = False) -> bool:
        """Replan if the link's bandwidth has changed, or at once when a receiver would be `idle`. Returns whether
        anything changed."""
        if not self.replan or time.monotonic() < self._rest_until_s:
            return False
        if not (idle or self._has_moved()):
            return False
        open_states = [state for state in self._usable(states) if _is_open(state)]
        if not open_states:
            return False
        began_s = time.monotonic()
        try:
            with self._timeline.span("plan", "again"):
                work, variants = self._work(open_states)
                kept = predict(work, _choices(open_states, variants), self.order)
                plan = self._planner.plan(work)
                better = plan.predicted_s < _WORTH_A_CHANGE * kept.predicted_s
                changed = self._adopt(plan if better else kept, open_states, variants)
        except Exception:  # a bug in a planner must not reach the engine
            log.exception("a fetch could not be replanned")
            self.replan = False
            return False
        took_s = time.monotonic() - began_s
        self._rest_until_s = time.monotonic() + max(_SHORTEST_INTERVAL_S, took_s / _MOST_PLANNING)
        if changed:
            self.replans += 1
            self._metrics.replanned()
            self._mark("replan", states)
        return changed

    def is_overtaken(self, states: Sequence[ChunkState]) -> bool:
        """Whether an engine that waits had better compute what has not arrived."""
        race = self._computing.race
        if race is None:
            return False
        delivered = next((state.index for state in states if not state.is_delivered), len(states))
        return race.is_lost(delivered, self._waits(states[delivered:]))

    def engine_began(self, first_token: int, tokens: int) -> None:
        prefill = self._computing.costs.snapshot().prefill
        self._busy_until_s = time.monotonic() + prefill.seconds(first_token, tokens)

    def engine_ended(self) -> None:
        self._busy_until_s = 0.0

    def learn(self, size_bytes: int, ended_s_ago: float) -> None:
        """Learn from a fetch that read this many bytes and computed nothing before the engine's last pass, which ended
        then. Where the engine waits, the fetch itself ended then."""
        late_s = time.monotonic() - ended_s_ago - self._ends_at_s
        self._computing.costs.observe_fetch(size_bytes, late_s)

    def remaining_s(self) -> float:
        """Planned seconds until the engine's last forward pass ends; where the engine waits, until the fetch does."""
        return max(0.0, self._ends_at_s - time.monotonic())

    def _bandwidth_Bps(self, endpoint: str) -> float | None:  # noqa: N802
        return self._links.bandwidth_Bps(endpoint, since_s=self._began_s)

    def _usable(self, states: Sequence[ChunkState]) -> Iterable[ChunkState]:
        """The chunks that may still be of use: an engine that waits takes none behind a lost one."""
        return takewhile(lambda state: not state.is_lost, states) if self._computing.waits else states

    def _waits(self, states: Sequence[ChunkState]) -> Iterator[tuple[str, float | None]]:
        """Endpoint of each chunk that is still to come, up to the first one that is not read, and the seconds that its
        rest takes; None where the bandwidth is not known."""
        known: dict[str, float | None] = {}
        for state in states:
            if state.to_compute:
                return
            endpoint = state.chunk.member.endpoint
            if endpoint not in known:
                known[endpoint] = self._bandwidth_Bps(endpoint)
            left_bytes = state.body_bytes * state.open_token_layers / (state.tokens * state.layers)
            bandwidth_Bps = known[endpoint]  # noqa: N806
            yield endpoint, None if bandwidth_Bps is None else left_bytes / max(bandwidth_Bps, 1.0)

    def _has_moved(self) -> bool:
        for endpoint, reckoned_Bps in self._reckoned_Bps.items():  # noqa: N806
            now_Bps = self._bandwidth_Bps(endpoint)  # noqa: N806
            if now_Bps is not None and not 1 / _MOVED < now_Bps / reckoned_Bps < _MOVED:
                return True
        return False

    def _work(self, states: Sequence[ChunkState]) -> tuple[Work, dict[int, list[int]]]:
        """Remaining work, and for each chunk the variant behind each option."""
        profile = self._computing.costs.snapshot()
        endpoints = {state.chunk.member.endpoint for state in states}
        bandwidths = {e: self._bandwidth_Bps(e) for e in endpoints}
        # The engine does not compute ahead until the links are known: it would slow the fetch down.
        computable = not self.replan or None not in bandwidths.values()
        chunks: list[ChunkWork] = []
        variants: dict[int, list[int]] = {}
        for state in states:
            options: list[Option] = []
            variants[state.index] = []
            for number, variant in enumerate(state.chunk.variants):
                left = None if state.is_lost else state.left(number)
                if left is None:
                    continue
                left_bytes, tokens_left = left
                name = variant.header.encoding.name
                cost = profile.codec(name)
                decode_s = cost.decode_s * tokens_left + profile.receive_s_per_byte * left_bytes
                option = Option(name, left_bytes, decode_s, cost.restore_s * tokens_left)
                # An option that is no more faithful, smaller or faster only makes the search longer.
                if number == state.choice or not any(_is_better(other, option) for other in options):
                    options.append(option)
                    variants[state.index].append(number)
            chunks.append(
                ChunkWork(
                    state.index,
                    state.chunk.first_token,
                    state.tokens,
                    state.chunk.member.endpoint,
                    tuple(options),
                    computable,
                )
            )
        work = Work(
            tuple(chunks),
            self._computing.suffix_first,
            self._computing.suffix_tokens,
            {e: b for e, b in bandwidths.items() if b is not None},
            {e: self._links.latency_s(e) for e in endpoints},
            profile.prefill,
            profile.interference,
            profile.decode_threads,
            max(0.0, self._busy_until_s - time.monotonic()),
            self._busy_share(bandwidths, profile.interference),
            fixed_end=any(state.wanted.has_windows for state in states[:1]),
        )
        return work, variants

    def _busy_share(self, bandwidths_Bps: Mapping[str, float | None], interference: float) -> float:  # noqa: N803
        together_Bps = busy_together_Bps = 1.0  # noqa: N806
        for endpoint, known_Bps in bandwidths_Bps.items():  # noqa: N806
            bandwidth_Bps = known_Bps or DEFAULT_BANDWIDTH_Bps  # noqa: N806
            busy_Bps = self._links.busy_Bps(endpoint)  # noqa: N806
            if busy_Bps is None:  # not measured yet: assume as much as decoding
                busy_Bps = max(LEAST_BUSY_Bps, bandwidth_Bps / (1.0 + interference))  # noqa: N806
            together_Bps += bandwidth_Bps  # noqa: N806
            busy_together_Bps += min(busy_Bps, bandwidth_Bps)  # noqa: N806
        return max(busy_together_Bps / together_Bps, _LEAST_BUSY_SHARE)

    def _adopt(self, plan: Plan, states: Sequence[ChunkState], variants: dict[int, list[int]]) -> bool:
        changed = plan.order != self.order
        for state in states:
            option = plan.choices[state.index]
            choice = COMPUTE if option == COMPUTE else variants[state.index][option]
            changed |= choice != state.choice
            state.choose(choice)
        self.order = plan.order
        waits_s = plan.fetch_s if self._computing.waits else plan.predicted_s
        self._ends_at_s = time.monotonic() + waits_s
        endpoints = {state.chunk.member.endpoint for state in states}
        self._reckoned_Bps = {e: self._bandwidth_Bps(e) or DEFAULT_BANDWIDTH_Bps for e in endpoints}
        return changed

    def _mark(self, name: str, states: Sequence[ChunkState]) -> None:
        how = [
            "computed" if s.to_compute else s.chunk.variants[s.choice].header.encoding.name for s in states
        ]
        bandwidth_Bps = min(self._reckoned_Bps.values(), default=0.0)  # noqa: N806
        self._timeline.mark(
            name,
            ", ".join(f"{how.count(what)} {what}" for what in dict.fromkeys(how)),
            bandwidth_Bps=bandwidth_Bps,
            order=self.order,
            predicted_s=self.remaining_s(),
            computed=how.count("computed"),
        )


def _choices(states: Sequence[ChunkState], variants: Mapping[int, list[int]]) -> dict[int, int]:
    """The current sources of the chunks, in the form of a plan."""
    return {s.index: COMPUTE if s.to_compute else variants[s.index].index(s.choice) for s in states}


def _is_better(more_faithful: Option, option: Option) -> bool:
    return more_faithful.size_bytes <= option.size_bytes and more_faithful.work_s <= option.work_s


def _is_open(state: ChunkState) -> bool:
    """Whether its source may still change."""
    if state.is_taken or state.is_lost:
        return False
    return state.to_compute or bool(state.unread)
