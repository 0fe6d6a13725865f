"""Has an engine store prompts."""

from collections.abc import Callable, Sequence

from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.stores import Store, settled_size

_ATTEMPTS = 5
"""A connector may store nothing at first, because it is still getting what it needs."""


def store_prompts(ask: Callable[[Prompt], Answer], store: Store, prompts: Sequence[Prompt]) -> int:
    """Asks prompts until each of them is reused. `ask` empties all caches but the store first. Returns the number of
    stored objects. Raises RequestError and ServiceError."""
    missing, stored = list(prompts), 0
    for _ in range(_ATTEMPTS):
        for prompt in missing:
            ask(prompt)
        stored = settled_size(store)
        missing = [prompt for prompt in missing if not ask(prompt).reused_tokens]
        if not missing:
            return stored
    raise RequestError(f"{len(missing)} prompts are not reused, with {stored} objects in the store")
