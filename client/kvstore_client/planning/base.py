"""What a fetch asks a planner, and what the planner answers.

A planner decides for every chunk of a match how it comes to be in the engine's cache: read in one of its stored
encodings, or computed by the engine. It is asked before a fetch, and again while the fetch runs and things move.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from kvstore_client.planning.profile import PrefillCost

COMPUTE: Final = -1
"""A choice that is no index into a chunk's options: the engine computes the chunk."""

Order = Literal["layers", "back"]
Bound = Literal["receive", "decode", "compute"]


@dataclass(frozen=True, slots=True)
class Option:
    """What is left of a chunk in one of its stored encodings. The seconds are one decoding thread's, undisturbed."""

    encoding: str
    size_bytes: int
    decode_s: float
    restore_s: float

    @property
    def work_s(self) -> float:
        return self.decode_s + self.restore_s


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """A chunk of the match that is not finished."""

    index: int
    """In the match; what a plan's choices are keyed by."""
    first_token: int
    tokens: int
    endpoint: str
    """Whose link its bytes come through."""
    options: tuple[Option, ...]
    """Most faithful first. Empty: the chunk cannot be fetched any more."""
    computable: bool = True
    """False once its bytes are being read or are there. A chunk without options is computed all the same."""


@dataclass(frozen=True, slots=True)
class Work:
    """All that is left to do before the engine can say its first token."""

    chunks: tuple[ChunkWork, ...]
    """In prompt order."""
    suffix_first: int
    """Position of the first token behind the match."""
    suffix_tokens: int
    """What the engine computes in any case, at the end."""
    bandwidths_Bps: Mapping[str, float]  # noqa: N815  (bytes, not bits)
    """By endpoint; one that is not in it has `links.DEFAULT_BANDWIDTH_Bps`."""
    latencies_s: Mapping[str, float]
    """From a request to its first byte, by endpoint; 0 where that is not known."""
    prefill: PrefillCost
    interference: float
    """How much decoding and computing slow each other: see `profile.Profile`."""
    decode_threads: int
    engine_busy_s: float = 0.0
    """What the engine still has to do of a forward pass that it has begun."""
    busy_share: float = 1.0
    """Of the links' bandwidth what comes while the engine computes chunks."""


@dataclass(frozen=True, slots=True)
class Plan:
    choices: Mapping[int, int]
    """Index of a chunk -> index into its options, or COMPUTE. Has every chunk of the work."""
    order: Order
    """"layers": the first layers of all chunks are read first, for an engine that follows layer by layer. "back": the
    last chunk first, each as a whole, while the engine computes the front: where they meet may still be moved."""
    predicted_s: float
    """From now to the end of the engine's last forward pass."""
    bound_by: Bound
    """The stage that takes longest."""


class Planner(Protocol):
    """Stateless: may be asked from any thread, of several fetches at once."""

    def plan(self, work: Work) -> Plan: ...
