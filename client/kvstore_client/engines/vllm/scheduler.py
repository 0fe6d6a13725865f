"""The scheduler's half of the connector: what is loaded, what is saved, and for which requests."""

import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.vllm.adapters import Adapters, UnusableAdapter
from kvstore_client.engines.vllm.events import stored_events
from kvstore_client.engines.vllm.generations import Generation
from kvstore_client.engines.vllm.kinds import KeyKind, kind_named
from kvstore_client.engines.vllm.load_plan import LoadPlanner, offer_of
from kvstore_client.engines.vllm.lookups import Found, Lookup, Lookups
from kvstore_client.engines.vllm.metadata import AdapterUse, LoadRequest, SaveRequest
from kvstore_client.engines.vllm.naming import RequestText, why_ineligible
from kvstore_client.engines.vllm.step_times import StepTimes
from kvstore_client.engines.vllm.stored_names import StoredNames
from kvstore_client.engines.vllm.tracked import TrackedRequest, loadable_tokens
from kvstore_client.engines.vllm.worker_news import News
from kvstore_client.giving_way import longest_wait_s
from kvstore_client.lookup import NOT_STORED
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import PrefillCost
from kvstore_client.planning.leading import UNKNOWN_PREFILL
from kvstore_client.settings import FetchPolicy
from kvstore_codec.errors import KVStoreError, NodeUnavailableError
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, PrefixId
from kvstore_codec.model_spec import ModelSpec

MAX_LOADS = 4
MAX_LOAD_BYTES = 1 << 30

_NAMED_BEFORE = 64
"""Chunks before the saved ones that are named with them. Each storage node is told of the nearest one that it has: with
16 nodes, 98 of 100 find theirs among 64."""


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """Bounds on loads in flight. Their requests hold blocks and cannot be preempted."""

    loads: int = MAX_LOADS
    size_bytes: int = MAX_LOAD_BYTES
    """KV of all loads together; a single load may be larger."""


class SchedulerHalf:
    """Answers the engine's scheduler at once, whatever the store does. Used by the scheduler's thread."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        block_tokens: int,
        limits: LoadLimits | None = None,
        *,
        wants_events: bool = False,
        lora_config: Any = None,
    ) -> None:
        """`lora_config` is vLLM's; None where the engine serves no LoRA adapters."""
        self._client, self._spec, self._block_tokens = client, spec, block_tokens
        self._limits, self._wants_events = limits or LoadLimits(), wants_events
        self.generation = Generation(client, spec)
        self._lookups = Lookups(self._peek)
        self._adapters = Adapters(lora_config, client.settings)
        self._wait_s = client.settings.timeouts.lookup_s
        self._tracked: dict[str, TrackedRequest] = {}
        self._to_start: list[LoadRequest] = []
        self._in_flight: dict[str, LoadRequest] = {}
        self._stored = StoredNames(longest_wait_s(client.settings))
        self._private = b""
        self._times = StepTimes()
        self._plans: LoadPlanner | None = None
        if client.settings.fetch.policy is FetchPolicy.ADAPTIVE:
            self._plans = LoadPlanner(spec, client.settings.fetch.decoders)
        self._step = 0
        self._overtaken: frozenset[str] = frozenset()
        """Loads that have ended with the last step although all their chunks are stored."""

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the `computed_tokens` can be loaded, and whether loading goes on beside the engine
        (always, where there is something). None: ask again. At least one token of the request stays to be computed.

        May be called any number of times: only the first call begins a lookup, and its answer is waited for
        `lookup_timeout_s` at most."""
        tracked = self._track(request)
        if self._waits_for_adapter(tracked):
            return None, False
        if tracked.why_ineligible is not None or tracked.was_loaded:
            return 0, False
        lookup = self._lookup(tracked)
        usable = loadable_tokens(request, self._block_tokens)
        if lookup is None or min(usable, len(tracked.text.ids) * CHUNK_TOKENS) <= computed_tokens:
            return 0, False
        if lookup.is_open(self._wait_s):
            return None, False
        waits = time.monotonic() < lookup.begun_s + self._wait_s
        if waits and tracked.refused_tokens and not self._has_room(tracked.refused_tokens):
            return None, False
        end = self._worth_loading(tracked, lookup.result, computed_tokens, usable)
        if end <= computed_tokens:
            return 0, False
        if not self._has_room(end - computed_tokens):
            tracked.refused_tokens = end - computed_tokens
            return (None if waits else 0), False
        tracked.offered_from = computed_tokens
        return end - computed_tokens, True

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """The engine has given the request blocks, into which `external_tokens` are to be loaded; 0: nothing is. The
        engine waits until the load is reported as ended: also one that was never offered is begun, and fails."""
        if not external_tokens:
            return
        tracked = self._tracked.get(request.request_id)
        first, ids = (0, []) if tracked is None else (tracked.offered_from, tracked.text.ids)
        end = first + external_tokens
        load = LoadRequest(
            request.request_id,
            tuple(ids[: -(-end // CHUNK_TOKENS)]),
            first,
            end,
            tuple(block_ids[: -(-end // self._block_tokens)]),
            rest_tokens=request.num_tokens - end,
            prefill=self._times.prefill or UNKNOWN_PREFILL,
            token_ids=self._tokens(tracked, first // CHUNK_TOKENS, -(-end // CHUNK_TOKENS)),
            adapter=tracked.adapter if tracked is not None else None,
        )
        if tracked is not None:
            tracked.was_loaded = True
            if self._plans is not None and tracked.planned is not None:
                self._plans.begun(load.request_id, tracked.planned)
        self._in_flight[load.request_id] = load
        self._to_start.append(load)

    def take_loads(self) -> tuple[LoadRequest, ...]:
        """The loads that the worker has to begin now. Never fails: the engine waits for them."""
        loads, self._to_start = tuple(self._to_start), []
        return loads

    def saves(self, output: Any) -> tuple[SaveRequest, ...]:
        """What the worker saves when the step that the engine has scheduled is computed."""
        try:
            scheduled = [
                (self._tracked[request_id], tokens) for request_id, tokens in self._scheduled(output)
            ]
        except Exception:
            for tracked in self._tracked.values():  # their blocks are not known any more
                tracked.why_ineligible = "its blocks are not known"
            raise
        found = (self._save_or_give_up(tracked, tokens) for tracked, tokens in scheduled)
        return tuple(save for save in found if save is not None)

    def scheduled(self, output: Any) -> tuple[int, bool]:
        """The engine has scheduled a step: its number, and whether anything is computed in it."""
        self._step += 1
        self._times.began(self._step, output)
        return self._step, output.total_num_scheduled_tokens > 0

    def learn(self, news: News) -> None:
        """A step has ended. To be told before `received`."""
        self._times.ended(news.step)
        self._overtaken = news.overtaken
        if self._plans is not None and news.learned is not None:
            self._plans.learn(news.learned)

    def received(self, request_ids: Collection[str], failed_blocks: Collection[int]) -> None:
        """The loads of these requests have ended; these blocks were not filled."""
        for request_id in request_ids:
            load = self._in_flight.pop(request_id, None)
            tracked = self._tracked.get(request_id)
            if self._plans is not None and load is not None:
                # A load whose request is gone was cancelled: it says nothing about how long loads take.
                complete = tracked is not None and set(load.block_ids).isdisjoint(failed_blocks)
                self._plans.ended(request_id, complete=complete)
            if load is None or tracked is None:
                continue
            failed = (index for index, block in enumerate(load.block_ids) if block in failed_blocks)
            filled = next(failed, None)
            if filled is None or request_id in self._overtaken:
                self._loaded(tracked, load, load.end_token // CHUNK_TOKENS)
            else:
                self._loaded_in_part(tracked, load, filled * self._block_tokens)

    def finished(self, request_id: str) -> None:
        """The engine has no such request any more."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None and tracked.lookup is not None:
            tracked.lookup.drop()

    def forget(self) -> None:
        """KV from before now must not be used any more, as when the engine's weights are replaced. Nothing of it is
        found again: the names of new chunks are this engine's own. Requests under way are neither loaded nor saved."""
        self._private = secrets.token_bytes(16)
        for tracked in self._tracked.values():
            tracked.why_ineligible = "the engine's caches were reset while it was under way"

    def close(self) -> None:
        self._lookups.close()
        self._client.close()

    def _peek(self, chunk_ids: Sequence[ChunkId]) -> Found:
        match = self._client.match(self._spec, chunk_ids, peek=True)
        try:
            self.generation.require()
        except NodeUnavailableError as error:
            if match.chunks:
                self._client.metrics.missed(MissReason.UNREACHABLE, detail=str(error))
            match = Match(why_not=f"unreachable: {error}")
        return Found(match, offer_of(match))

    def _next_id(self, parent: PrefixId, tokens: Sequence[int], qualifier: bytes) -> ChunkId:
        return self._client.next_chunk_id(self._spec, parent, tokens, self._private + qualifier)

    def _track(self, request: Any) -> TrackedRequest:
        tracked = self._tracked.get(request.request_id)
        generation = self._client.canaries.generation(self._spec.digest)
        if tracked is not None and tracked.is_renamed(generation):
            self.finished(request.request_id)
            tracked = None
        if tracked is None:
            tracked = TrackedRequest(RequestText(request), why_ineligible(request), generation)
            self._tracked[request.request_id] = tracked
            self._name(tracked, tracked.text.known_tokens)
        return tracked

    def _name(self, tracked: TrackedRequest, tokens: int) -> list[ChunkId]:
        """Ids of the full chunks of the first tokens; none for a request that is not eligible, or whose LoRA adapter is
        not known yet."""
        if tracked.why_ineligible is None and self._knows_adapter(tracked):
            try:
                return tracked.text.name(tokens, self._next_id)
            except KVStoreError as error:
                tracked.why_ineligible = str(error)
        return []

    def _knows_adapter(self, tracked: TrackedRequest) -> bool:
        """Whether the chunks of the request can be named as far as its LoRA adapter goes, if it has one."""
        asked = tracked.text.request.lora_request
        if asked is None or tracked.adapter is not None:
            return True
        found = self._adapters.find(asked)
        if isinstance(found, UnusableAdapter):
            tracked.why_ineligible = found.why
            self._client.metrics.missed(found.reason, detail=found.why, cause=found.why)
        elif found is not None:
            tracked.text.adapter, tracked.adapter = found.digest, AdapterUse(asked.lora_int_id, found.files)
        return tracked.adapter is not None

    def _waits_for_adapter(self, tracked: TrackedRequest) -> bool:
        """Whether the request's LoRA adapter is still being read, and may be known in time."""
        if tracked.why_ineligible is not None or tracked.text.ids:
            return False
        if self._knows_adapter(tracked):
            self._name(tracked, tracked.text.known_tokens)
        elif tracked.why_ineligible is None and not tracked.is_adapter_late:
            tracked.is_adapter_late = time.monotonic() >= tracked.begun_s + self._wait_s
            if tracked.is_adapter_late:
                self._client.metrics.missed(MissReason.ADAPTER_PENDING)
            return not tracked.is_adapter_late
        return False

    def _lookup(self, tracked: TrackedRequest) -> Lookup | None:
        """The request's lookup, begun now if it has none; None for a request without a full chunk, and where too many
        lookups are under way."""
        if tracked.lookup is None and tracked.text.ids:
            tracked.lookup = self._lookups.begin(tracked.text.ids)
        return tracked.lookup

    def _worth_loading(
        self, tracked: TrackedRequest, found: Found | None, first_token: int, usable: int
    ) -> int:
        """Position up to which to load, `first_token` for nothing."""
        end = min(usable, found.match.tokens) if found is not None else 0
        if found is None or end <= first_token:
            return first_token
        if self._plans is None:
            return end
        tokens, prefill = tracked.text.known_tokens, self._times.prefill
        busy_s = self._others_s(tracked, prefill) if prefill is not None else 0.0
        planned = self._plans.plan(found.offer, first_token, end, tokens, prefill, busy_s)
        tracked.planned = planned
        if planned is None:
            return first_token
        return planned.end_token // self._block_tokens * self._block_tokens

    def _others_s(self, tracked: TrackedRequest, prefill: PrefillCost) -> float:
        """Seconds that the engine still computes prompts of other requests."""
        return sum(
            prefill.seconds(other.computed_tokens, other.text.known_tokens - other.computed_tokens)
            for other in self._tracked.values()
            if other is not tracked and 0 < other.computed_tokens < other.text.known_tokens - 1
        )

    def _has_room(self, tokens: int) -> bool:
        if not self._in_flight:
            return True
        loading = sum(load.end_token - load.first_token for load in self._in_flight.values())
        size_bytes = (loading + tokens) * self._spec.kv_bytes_per_token
        return len(self._in_flight) < self._limits.loads and size_bytes <= self._limits.size_bytes

    def _scheduled(self, output: Any) -> Iterator[tuple[str, int]]:
        """Each request of a step, with the number of its tokens whose KV is there when the step ends."""
        for new in output.scheduled_new_reqs:
            if tracked := self._tracked.get(new.req_id):
                tracked.block_ids = list(new.block_ids[0])
                tracked.computed_tokens = new.num_computed_tokens + output.num_scheduled_tokens[new.req_id]
                yield new.req_id, tracked.computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if tracked := self._tracked.get(request_id):
                if request_id in cached.resumed_req_ids:
                    tracked.block_ids = []
                if blocks is not None:
                    tracked.block_ids += blocks[0]
                tracked.computed_tokens = computed + output.num_scheduled_tokens[request_id]
                yield request_id, tracked.computed_tokens

    def _loaded(self, tracked: TrackedRequest, load: LoadRequest, chunks: int) -> None:
        """The first chunks of the load are stored."""
        self._stored.add(load.chunk_ids[:chunks])
        tracked.saved_chunks = max(tracked.saved_chunks, chunks)

    def _loaded_in_part(self, tracked: TrackedRequest, load: LoadRequest, tokens: int) -> None:
        """Behind these tokens nothing was loaded: what is computed there is to be stored, whatever the lookup found.
        Where nothing at all was loaded, that goes for the chunks before the load, too."""
        self._stored.discard(load.chunk_ids)
        tracked.is_lookup_counted = True
        tracked.saved_chunks = 0
        if tokens > load.first_token:
            self._loaded(tracked, load, tokens // CHUNK_TOKENS)

    def _save_or_give_up(self, tracked: TrackedRequest, tokens: int) -> SaveRequest | None:
        """As `_save`. A request that cannot be named must not keep others from being saved."""
        try:
            return self._save(tracked, tokens)
        except Exception as error:
            tracked.why_ineligible = f"a mistake in kvstore: {error}"
            detail = f"a request of vLLM is not stored: {error}"
            self._client.metrics.missed(MissReason.INTERNAL_ERROR, detail=detail, error=error)
            return None

    def _save(self, tracked: TrackedRequest, tokens: int) -> SaveRequest | None:
        """The chunks of the first `tokens` tokens that are not stored yet. None where there are none, and as long as it
        is not known whether the store can be reached."""
        if tokens // CHUNK_TOKENS <= tracked.saved_chunks or not self._may_save(tracked):
            return None
        if len(tracked.block_ids) * self._block_tokens < tokens:
            tracked.why_ineligible = f"it has {tokens} computed tokens in {len(tracked.block_ids)} blocks"
            return None
        ids = self._name(tracked, tokens)
        first = tracked.saved_chunks
        while first < len(ids) and ids[first] in self._stored:
            first += 1
        tracked.saved_chunks = max(first, len(ids))
        if first >= len(ids):
            return None
        self._stored.add(ids[first:])
        blocks = CHUNK_TOKENS // self._block_tokens
        begins = max(0, first - _NAMED_BEFORE)
        is_published = self._wants_events and not self._private
        chunks = range(first, len(ids) if is_published else first)
        return SaveRequest(
            tuple(ids[begins:]),
            begins,
            first,
            tuple(tracked.block_ids[first * blocks : len(ids) * blocks]),
            self._tokens(tracked, first, len(ids)),
            stored_events(tracked.text.request, chunks, self._block_tokens),
            tracked.adapter,
            tracked.text.request.request_id,
        )

    def _tokens(self, tracked: TrackedRequest | None, first_chunk: int, end_chunk: int) -> tuple[int, ...]:
        """Tokens of these chunks, where the worker needs them."""
        if tracked is None or kind_named(self._spec) is KeyKind.AFTER_ROPE:
            return ()
        return tuple(
            tracked.text.request.all_token_ids[first_chunk * CHUNK_TOKENS : end_chunk * CHUNK_TOKENS]
        )

    def _may_save(self, tracked: TrackedRequest) -> bool:
        """Takes what the lookup found stored off what is saved."""
        if tracked.generation != self._client.canaries.generation(self._spec.digest):
            tracked.why_ineligible = "its chunks were named before the model's canary was replaced"
        if tracked.why_ineligible is not None:
            return False
        if tracked.is_lookup_counted or tracked.lookup is None:
            return True
        match = tracked.lookup.match
        if match is None or not (match.chunks or match.why_not == NOT_STORED):
            return False
        self._stored.add(chunk.chunk_id for chunk in match.chunks)
        tracked.saved_chunks = max(tracked.saved_chunks, len(match.chunks))
        tracked.is_lookup_counted = True
        return True
