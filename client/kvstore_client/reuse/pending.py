"""A call that was begun and is to be finished: what is reused of its prompt may be on its way."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.identity import ModelSnapshot
from kvstore_client.reuse.incoming import IncomingKV
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.timeline import Timeline


@dataclass(frozen=True, slots=True)
class BypassedGeneration:
    """A call that runs without reuse."""

    call: EngineCall
    reason: str
    """One word for metrics and reports."""
    timeline: Timeline
    why_not: str | None = None
    """The reason as a sentence, where a word does not say enough."""

    buffer_bytes = 0

    def on_ready(self, callback: Callable[[], object]) -> None:
        callback()

    def remaining_s(self) -> float:
        return 0.0

    def cancel(self) -> None:
        """Nothing to do."""

    @property
    def report(self) -> GenerationReport:
        why_not = self.why_not or f"bypassed: {self.reason}"
        return GenerationReport(
            self.call.prompt_tokens, 0, self.timeline, bypassed=self.reason, why_not=why_not
        )


@dataclass(frozen=True, slots=True)
class Completed:
    """How a call ended."""

    output: Any
    """What the caller of the engine is given."""
    report: GenerationReport


class ReusingGeneration(ABC):
    """A call of which something may be reused. The subclasses say what is reused of its prompt, and how."""

    def __init__(
        self,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        incoming: IncomingKV | None,
        why_not: str | None,
    ) -> None:
        self.call, self.timeline = call, timeline
        self.snapshot = snapshot
        """The model as it was when the prompt was looked up, or when it was seen last to be the same."""
        self.incoming = incoming
        """What is on its way; None when nothing is, or not any more."""
        self.why_not = why_not
        """Why nothing is on its way, if nothing is."""

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffers that its KV is coming into."""
        return self.incoming.buffers.memory.numel() if self.incoming is not None else 0

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would not have to wait any more (`Fetch.on_ready`): in any thread, and
        not for computing."""
        if self.incoming is None:
            callback()
        else:
            self.incoming.fetch.on_ready(callback)

    def remaining_s(self) -> float:
        """Predicted time until the engine need not wait any more; infinite where there is no plan to go by."""
        return 0.0 if self.incoming is None else self.incoming.fetch.planned_s() or math.inf

    def cancel(self) -> None:
        """Nobody will finish it: end its fetch, and give its buffers back. Safe to call more than once."""
        incoming, self.incoming = self.incoming, None
        if incoming is not None:
            incoming.release()

    @abstractmethod
    def complete(self) -> Completed:
        """Compute what does not come, answer the call, and hand in what is to be stored of it. Raises what the engine
        raises. Holds nothing afterwards."""


PendingGeneration: TypeAlias = ReusingGeneration | BypassedGeneration
"""Hand it to `ReuseSession.finish`, or `cancel` it."""
