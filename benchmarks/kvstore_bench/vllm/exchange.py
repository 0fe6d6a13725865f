"""What one engine stores, a second one of the same model loads: answers, times, and the bytes in both memories."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvstore_bench.vllm.completions import Answer, Completions
from kvstore_bench.vllm.engine import Engine, EngineOptions
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.setups import Setup
from kvstore_bench.vllm.stores import Store, settled_size
from kvstore_bench.vllm.worker_extension import EXTENSION
from kvstore_codec.identity import CHUNK_TOKENS

_SILENCE_S = 240.0
UNCOUNTED_PROMPTS = 2
"""Of each length: one to warm up with, one to compare the engines' memory with."""
_ATTEMPTS = 5
"""A connector may store or load nothing at first, because it is still getting a calibration."""
_BEHIND_CHUNKS = 8


def comparable_length(tokens: int) -> int:
    """A length near `tokens` of which vLLM's own prefix cache and the store reuse the same tokens: whole chunks, and
    less than a block behind them."""
    return max(tokens // CHUNK_TOKENS, 1) * CHUNK_TOKENS + _BEHIND_CHUNKS


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One prompt."""

    cold: Answer
    """Of the first engine, which stores its KV."""
    own_hit: Answer
    """Of the first engine again, from vLLM's own prefix cache."""
    store_hit: Answer | None
    """Of the second engine. None without one."""

    @property
    def is_same(self) -> bool | None:
        """Whether the second engine has given the tokens of the own hit. None where it has not reused as many."""
        if self.store_hit is None or self.store_hit.reused_tokens != self.own_hit.reused_tokens:
            return None
        return self.store_hit.tokens == self.own_hit.tokens


@dataclass(frozen=True, slots=True)
class Result:
    rows: list[dict[str, Any]]
    """One for each length of the prompts: {connector, kv_layout, prompt_tokens, prompts, cold_ttft_s, own_hit_ttft_s,
    store_hit_ttft_s (medians), own_reused_tokens, reused_tokens (medians), answers_compared, answers_same_as_own_hit}.
    With exact KV also same_bytes: whether the blocks of a prompt that the second engine has loaded hold what the first
    one has computed."""
    copies: list[dict[str, Any]]
    """Rows of `KVMemoryInspection.kvstore_copies`."""
    memory: dict[str, Any] | None
    """As `KVMemoryInspection.kvstore_layout` describes it. None, and no copies, for connectors of vLLM's."""


def measure(
    setup: Setup,
    python: Path,
    options: EngineOptions,
    folder: Path,
    store: Store,
    address: str,
    prompts: Mapping[int, Sequence[Prompt]],
    answer_tokens: int,
) -> Result:
    """Starts the engines with `python` and asks them `prompts`: by their length, which is a `comparable_length`, more
    than UNCOUNTED_PROMPTS of each. None of them may be stored at `address`. Raises StartupError, RequestError and
    ServiceError."""
    with ExitStack() as stack:
        engines = [
            stack.enter_context(engine) for engine in _started(setup, python, options, folder, address)
        ]
        for engine in engines:
            engine.wait()
        first, second = engines[0].completions, engines[1].completions if len(engines) > 1 else None
        memory = first.call_worker("kvstore_layout") if setup.is_ours else None
        rows = []
        for tokens, (warm_up, compared, *counted) in prompts.items():
            prepare(first, second, store, warm_up)
            row = setup.about | {"prompt_tokens": tokens}
            if setup.is_exact and second is not None:
                row["same_bytes"] = has_same_bytes(first, second, store, compared)
            rows.append(row | exchange_row(exchange(first, second, store, counted, answer_tokens)))
        copies = first.call_worker("kvstore_copies") if setup.is_ours else []
        return Result(rows, [setup.about | row for row in copies], memory)


def prepare(first: Completions, second: Completions | None, store: Store, prompt: Prompt) -> None:
    """Has the first engine store a prompt, and the second one load it unless it plans otherwise, so that neither has
    to initialise anything later. Raises RequestError, also when nothing is ever stored, and ServiceError."""
    _ask(first, prompt.ids, 1)
    if second is None:
        return
    for _ in range(_ATTEMPTS):
        if settled_size(store):
            break
        first.forget()
        _ask(first, prompt.ids, 1)
    else:
        raise RequestError(f"nothing is stored of {len(prompt.ids)} tokens, in {_ATTEMPTS} requests")
    for _ in range(_ATTEMPTS):
        if _ask(second, prompt.ids, 1).reused_tokens:
            return
        second.forget()


def has_same_bytes(first: Completions, second: Completions, store: Store, prompt: Prompt) -> bool:
    """Whether the blocks that the second engine has loaded hold what the first one has computed. Raises RequestError
    and ServiceError.

    Both are asked the same chunks with other tokens behind them, so that blocks that both compute differ."""
    chunks, behind = prompt.ids[:-_BEHIND_CHUNKS], prompt.ids[-_BEHIND_CHUNKS:]
    _ask(first, prompt.ids, 1)
    settled_size(store)
    known = _digests(second)
    loaded = _ask(second, (*chunks, *reversed(behind)), 1).reused_tokens
    same = (_digests(second) - known) & _digests(first)
    return loaded == len(chunks) and len(same) * first.call_worker("kvstore_layout")["block_tokens"] == loaded


def exchange(
    first: Completions,
    second: Completions | None,
    store: Store,
    prompts: Sequence[Prompt],
    answer_tokens: int,
) -> list[Exchanged]:
    """`second` is asked when all that `first` has computed is stored. Raises RequestError and ServiceError."""
    own = [tuple(_ask(first, prompt.ids, answer_tokens) for _ in range(2)) for prompt in prompts]
    if second is None:
        return [Exchanged(cold, hit, None) for cold, hit in own]
    settled_size(store)
    hits = [_ask(second, prompt.ids, answer_tokens) for prompt in prompts]
    return [Exchanged(cold, hit, loaded) for (cold, hit), loaded in zip(own, hits, strict=True)]


def exchange_row(found: Sequence[Exchanged]) -> dict[str, Any]:
    """Of prompts of one length, the part of a row that `Result` describes from `prompts` on."""
    hits = [one.store_hit for one in found if one.store_hit is not None]
    same = [one.is_same for one in found if one.is_same is not None]
    return {
        "prompts": len(found),
        "cold_ttft_s": statistics.median(one.cold.ttft_s for one in found),
        "own_hit_ttft_s": statistics.median(one.own_hit.ttft_s for one in found),
        "store_hit_ttft_s": statistics.median(hit.ttft_s for hit in hits) if hits else None,
        "own_reused_tokens": statistics.median(one.own_hit.reused_tokens for one in found),
        "reused_tokens": statistics.median(hit.reused_tokens for hit in hits) if hits else None,
        "answers_compared": len(same),
        "answers_same_as_own_hit": sum(same),
    }


def _started(
    setup: Setup, python: Path, options: EngineOptions, folder: Path, address: str
) -> Iterator[Engine]:
    """The engines, which are still loading."""
    extended = replace(options, extra=(*options.extra, "--worker-extension-cls", EXTENSION))
    for part in ("first",) if setup.make is None else ("first", "second"):
        name = f"{setup.label}-{part}"
        yield Engine(name, python, extended, folder, setup.connector(address, folder / f"{name}-cache"))


def _ask(engine: Completions, tokens: Sequence[int], answer_tokens: int) -> Answer:
    return engine.complete(tokens, answer_tokens, _SILENCE_S)


def _digests(engine: Completions) -> set[str]:
    """Of all blocks of the engine's KV memory."""
    return set(engine.call_worker("kvstore_block_digests"))
