"""A call between its `begin` and its `finish`: its reused KV may be on the way."""

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
    """The reason as a sentence, where one word is not enough."""

    buffer_bytes = 0

    def on_ready(self, callback: Callable[[], object]) -> None:
        callback()

    def remaining_s(self) -> float:
        return 0.0

    def cancel(self) -> None:
        """Nothing to cancel."""

    @property
    def report(self) -> GenerationReport:
        why_not = self.why_not or f"bypassed: {self.reason}"
        return GenerationReport(
            self.call.prompt_tokens, 0, self.timeline, bypassed=self.reason, why_not=why_not
        )


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """Result of a call."""

    output: Any
    """Return value for the engine's caller."""
    report: GenerationReport


class ReusingGeneration(ABC):
    """A call that may reuse KV. Subclasses decide which KV of its prompt is reused, and how."""

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
        """The model when the prompt was looked up, or when it was last seen unchanged."""
        self.incoming = incoming
        """The fetch in progress; None when there is none."""
        self.why_not = why_not
        """Why no KV is fetched, if none is."""

    @property
    def buffer_bytes(self) -> int:
        """Size of the fetch's buffers, bytes."""
        return self.incoming.buffers.memory.numel() if self.incoming is not None else 0

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would no longer wait (`Fetch.on_ready`): in any thread, and not for
        computing."""
        if self.incoming is None:
            callback()
        else:
            self.incoming.fetch.on_ready(callback)

    def remaining_s(self) -> float:
        """Predicted seconds until the engine would no longer wait; infinite without a plan."""
        return 0.0 if self.incoming is None else self.incoming.fetch.planned_s() or math.inf

    def cancel(self) -> None:
        """Abandon the call: end its fetch and release its buffers. May be called repeatedly."""
        incoming, self.incoming = self.incoming, None
        if incoming is not None:
            incoming.release()

    @abstractmethod
    def complete(self) -> CompletedCall:
        """Compute missing KV, answer the call, and queue its new chunks for storing. Raises the engine's errors.
        Releases all resources."""


PendingGeneration: TypeAlias = ReusingGeneration | BypassedGeneration
"""Pass it to `ReuseSession.finish`, or `cancel` it."""
