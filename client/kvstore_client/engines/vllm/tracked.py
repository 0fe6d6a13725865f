"""What the scheduler's half of the connector knows of one request."""

import time
from dataclasses import dataclass, field
from typing import Any

from kvstore_client.engines.vllm.load_plan import PlannedLoad
from kvstore_client.engines.vllm.lookups import Lookup
from kvstore_client.engines.vllm.metadata import AdapterUse
from kvstore_client.engines.vllm.naming import RequestText


@dataclass(slots=True)
class TrackedRequest:
    """One request of the engine."""

    text: RequestText
    why_ineligible: str | None
    generation: int
    """That of the canary under which the request's chunks are named."""
    begun_s: float = field(default_factory=time.monotonic)
    """When the engine has first asked for it."""
    adapter: AdapterUse | None = None
    """Its LoRA adapter, if it has one, as soon as that is known."""
    is_adapter_late: bool = False
    """Whether the request has waited for its adapter as long as it may."""
    lookup: Lookup | None = None
    was_loaded: bool = False
    """Whether a load was begun. There is no second one: after a failure it would fail again."""
    offered_from: int = 0
    """Tokens that the engine had itself when it was last told what can be loaded."""
    planned: PlannedLoad | None = None
    """The load that the engine was last told of."""
    refused_tokens: int = 0
    """Tokens of the load that there was no room for. It is planned again when there is: many requests may wait, and
    each is asked for in every step."""
    block_ids: list[int] = field(default_factory=list)
    computed_tokens: int = 0
    """Tokens whose KV is there when the last scheduled step ends; 0 before the first step."""
    is_lookup_counted: bool = False
    """Whether `saved_chunks` takes account of what the lookup found."""
    saved_chunks: int = 0
    """Leading chunks that are stored, or were handed over."""

    def is_renamed(self, generation: int) -> bool:
        """Whether the chunks of the request would have other names now."""
        return self.why_ineligible is None and not self.was_loaded and self.generation != generation


def loadable_tokens(request: Any, block_tokens: int) -> int:
    """How many leading tokens of a request may be loaded: whole blocks, and at least one token stays to be computed.

    None where its whole prompt must be computed, as for the scores of its tokens: vLLM 0.30 asks for such a request,
    too, and would wait for scores that never come; later versions do not ask."""
    if request.skip_reading_prefix_cache:
        return 0
    return int(request.num_tokens - 1) // block_tokens * block_tokens
