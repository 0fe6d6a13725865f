"""Loads of one worker: fetches into the engine's blocks, begun and ended beside the engine."""

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.vllm.before_rope import KeysBeforeRope
from kvstore_client.engines.vllm.load_plan import unmeasured
from kvstore_client.engines.vllm.metadata import LoadRequest
from kvstore_client.fetch import Computing, Destination, Fetch
from kvstore_client.fetch.destination import DestinationInFront
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Costs, Profile, Race
from kvstore_client.planning.leading import UNKNOWN_PREFILL
from kvstore_client.processors import leave_engines_processor
from kvstore_client.request_id import request_scope
from kvstore_client.settings import FetchPolicy
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec

_THREADS = 4
"""They look up, start fetches and cancel them. A fetch has threads of its own."""

_INTERFERENCE = 1.0
"""Decoding and computing take turns on a processor. What they really do is not measured."""
_POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class LoadWindow(DestinationInFront):
    """Lets through to `inner` only positions in `[first_token, end_token)`: blocks before it may be in use by other
    requests, and there are none behind it. A `Destination` of a fetch."""

    first_token: int
    end_token: int

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        inside = slice(max(tokens.start, self.first_token), min(tokens.stop, self.end_token))
        if inside.start < inside.stop:
            here = slice(inside.start - tokens.start, inside.stop - tokens.start)
            self.inner.complete(layers, inside, keys[:, :, here], values[:, :, here])


@dataclass(frozen=True, slots=True)
class LoadedBlocks:
    """Loads that have ended."""

    request_ids: frozenset[str] = frozenset()
    failed_blocks: frozenset[int] = frozenset()
    """Blocks that were not filled."""


class _Load:
    """One load. Its thread of the pool writes `match` and `fetch` before `begun` is done."""

    def __init__(self, request: LoadRequest) -> None:
        self.request = request
        self.match = Match()
        self.fetch: Fetch | None = None
        self.asked_s = time.monotonic()
        self.begun: Future[None] = Future()
        self.is_cancelled = False

    def is_ended(self) -> bool:
        """Whether no thread writes into the blocks any more."""
        return self.begun.done() and (self.fetch is None or self.fetch.finished() is not None)

    @property
    def is_all_stored(self) -> bool:
        """Whether all chunks are stored, although not all of them were waited for. Of a load that has ended."""
        report = self.fetch.finished() if self.fetch is not None else None
        asked = len(self.request.chunk_ids) - self.request.first_chunk
        return (
            report is not None
            and report.chunks == asked
            and set(report.missing.values()) <= {MissReason.OVERTAKEN}
        )

    def failed_blocks(self, block_tokens: int) -> tuple[int, ...]:
        """The blocks from the first one on that was not filled; the engine computes all behind it. Of a load that has
        ended."""
        request, loaded = self.request, 0
        report = self.fetch.finished() if self.fetch is not None else None
        if report is not None:
            loaded = (request.first_chunk + report.delivered) * CHUNK_TOKENS
        if loaded >= request.end_token:
            return ()
        return request.blocks_from(max(loaded, request.first_token), block_tokens)


class Loads:
    """The loads of one worker. No method waits but `wait` and `close`. Used by the worker's thread."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        block_tokens: int,
        destination: Callable[[LoadRequest], Destination],
        before_rope: KeysBeforeRope | None = None,
    ) -> None:
        """`before_rope` is needed for KV that is stored with keys before RoPE."""
        decoders = client.settings.fetch.decoders
        self.costs = Costs(Profile({}, UNKNOWN_PREFILL, _INTERFERENCE, decoders, unmeasured=unmeasured(spec)))
        """Learned from the loads."""
        self._client, self._spec, self._block_tokens = client, spec, block_tokens
        self._destination, self._before_rope = destination, before_rope
        self._threads, self._is_closed = _new_threads(), False
        self._loads: dict[str, _Load] = {}
        self._overtaken: set[str] = set()

    def start(self, request: LoadRequest) -> None:
        load = self._loads[request.request_id] = _Load(request)
        try:
            self._threads.submit(self._begin, load)
        except (
            RuntimeError
        ) as error:  # closed, or no thread left; a later thread may still find it in the queue
            if load.begun.cancel():
                self._failed(load, MissReason.NO_RESOURCES, error)

    def cancel(self, request_ids: Collection[str]) -> None:
        """These requests are gone. Their loads end soon, and are reported as ended."""
        for request_id in request_ids:
            load = self._loads.get(request_id)
            if load is not None and not load.is_cancelled:
                load.is_cancelled = True
                if load.begun.done() and load.fetch is not None:
                    with suppress(RuntimeError):  # no thread left: the fetch ends at its deadline
                        self._threads.submit(load.fetch.cancel)

    def wait(self, limit_s: float) -> None:
        """Wait until one of the loads has ended, `limit_s` at most; without loads not at all."""
        until_s = time.monotonic() + limit_s
        while (
            self._loads
            and not any(load.is_ended() for load in self._loads.values())
            and time.monotonic() < until_s
        ):
            time.sleep(_POLL_S)

    def ended(self) -> LoadedBlocks:
        """The loads that have ended since the last call, each once, those that failed among them."""
        if not self._loads:
            return LoadedBlocks()
        ended: set[str] = set()
        failed: set[int] = set()
        for request_id, load in tuple(self._loads.items()):
            blocks = self._failed_blocks(load)
            if blocks is not None:
                del self._loads[request_id]
                ended.add(request_id)
                failed.update(() if load.is_cancelled else blocks)
        if not self._loads and not self._is_closed:
            # A thread that has computed keeps the engine's from spinning until it ends (see `run_apart`).
            self._threads.shutdown(wait=False)
            self._threads = _new_threads()
        return LoadedBlocks(frozenset(ended), frozenset(failed))

    def take_overtaken(self) -> frozenset[str]:
        """Loads that have ended since the last call because computing was faster: what they lack is stored still."""
        overtaken, self._overtaken = self._overtaken, set()
        return frozenset(overtaken)

    def close(self) -> None:
        """End all loads."""
        self._is_closed = True
        self.cancel(tuple(self._loads))
        self._threads.shutdown(wait=True)

    def _failed_blocks(self, load: _Load) -> tuple[int, ...] | None:
        """None while the load goes on. The engine waits for the end of each load, so a mistake here is one: a fetch
        raises nothing before its threads have ended."""
        try:
            if not load.is_ended():
                return None
            blocks = load.failed_blocks(self._block_tokens)
            if blocks and not load.is_cancelled and load.is_all_stored:
                self._overtaken.add(load.request.request_id)
        except Exception as error:
            self._failed(load, MissReason.INTERNAL_ERROR, error)
            return load.request.blocks_from(load.request.first_token, self._block_tokens)
        else:
            return blocks

    def _begin(self, load: _Load) -> None:
        """In a thread of the pool."""
        with request_scope(load.request.request_id):
            self._begin_named(load)

    def _begin_named(self, load: _Load) -> None:
        if not load.begun.set_running_or_notify_cancel():
            return
        try:
            found = self._client.match(self._spec, load.request.chunk_ids)
            # A fetch takes whole chunks. What the engine has already is left out, but for the rest of a chunk.
            load.match = replace(found, chunks=found.chunks[load.request.first_chunk :])
            if load.match.chunks and not load.is_cancelled:
                load.fetch = self._fetch(load)
        except Exception as error:
            self._failed(load, MissReason.INTERNAL_ERROR, error)
        finally:
            try:
                if load.fetch is None:
                    self._client.release(load.match)
            except RuntimeError as error:  # gRPC has found no thread left: the leases expire
                self._failed(load, MissReason.NO_RESOURCES, error)
            finally:  # whatever has failed: the engine waits for the end
                load.begun.set_result(None)
            if load.is_cancelled and load.fetch is not None:
                load.fetch.cancel()

    def _fetch(self, load: _Load) -> Fetch | None:
        destination, features = self._destination(load.request), None
        if self._before_rope is not None:
            destination = self._before_rope.destination(destination)
            features = self._before_rope.features(load.request.token_ids)
        window = LoadWindow(destination, load.request.first_token, load.request.end_token)
        try:
            computing = self._computing(load)
            return self._client.fetch(load.match, window, None, features=features, computing=computing)
        except (RuntimeError, MemoryError) as error:
            self._failed(load, MissReason.NO_RESOURCES, error)
            return None

    def _computing(self, load: _Load) -> Computing:
        """What the engine computes behind the load, and what it would compute without it."""
        request, chunks = load.request, load.match.chunks
        self.costs.set_prefill(request.prefill)
        end_of_prompt = request.end_token + request.rest_tokens
        end = min(request.end_token, chunks[-1].first_token + CHUNK_TOKENS)
        race = None
        if self._client.settings.fetch.policy is FetchPolicy.ADAPTIVE:
            bounds = [*(chunk.first_token for chunk in chunks), end]
            race = Race(bounds, end_of_prompt, request.prefill, load.asked_s)
        return Computing(self.costs, end, end_of_prompt - end, waits=True, race=race)

    def _failed(self, load: _Load, reason: MissReason, error: Exception) -> None:
        chunks = len(load.request.chunk_ids)
        detail = f"cannot load {chunks} chunks, which are computed: {error}"
        traced = error if reason is MissReason.INTERNAL_ERROR else None
        self._client.metrics.missed(reason, chunks, detail=detail, error=traced)


def _new_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "kvstore-load", initializer=leave_engines_processor)
