"""Interface between a fetch and its planner.

A planner decides how each chunk of a match gets into the engine's cache: read in one of its stored encodings, or
computed by the engine. It runs before a fetch, and again during the fetch when conditions change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from kvstore_client.planning.profile import PrefillCost

COMPUTE: Final = -1
"""The choice that the engine computes the chunk; it is not an index into the chunk's options."""

Order = Literal["layers", "back", "front"]
Bound = Literal["receive", "decode", "compute"]


@dataclass(frozen=True, slots=True)
class Option:
    """The rest of a chunk in one of its stored encodings. Seconds are those of one undisturbed decoding thread."""

    encoding: str
    size_bytes: int
    decode_s: float
    restore_s: float

    @property
    def work_s(self) -> float:
        return self.decode_s + self.restore_s


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """An unfinished chunk of the match."""

    index: int
    """Index in the match; key of the plan's choices."""
    first_token: int
    tokens: int
    endpoint: str
    """Endpoint whose link delivers its bytes."""
    options: tuple[Option, ...]
    """Most faithful first. Empty: the chunk cannot be fetched any more."""
    computable: bool = True
    """False once its bytes are being read or have arrived. A chunk without options is computed in any case."""


@dataclass(frozen=True, slots=True)
class Work:
    """All work left until the engine can produce its first token."""

    chunks: tuple[ChunkWork, ...]
    """Chunks in prompt order."""
    suffix_first: int
    """Position of the first token behind the match."""
    suffix_tokens: int
    """Number of tokens at the end that the engine computes in any case."""
    bandwidths_Bps: Mapping[str, float]  # noqa: N815  (bytes, not bits)
    """By endpoint; the default is `links.DEFAULT_BANDWIDTH_Bps`."""
    latencies_s: Mapping[str, float]
    """Seconds from a request to its first byte, by endpoint; 0 where unknown."""
    prefill: PrefillCost
    interference: float
    """How much decoding and computing slow each other; see `profile.Profile`."""
    decode_threads: int
    engine_busy_s: float = 0.0
    """Seconds until the engine's current forward pass ends."""
    busy_share: float = 1.0
    """Share of the links' bandwidth that is available while the engine computes chunks."""
    fixed_end: bool = False
    """Whether chunks at the end that can be fetched are fetched, unless all are computed. In layers with a sliding
    window only the windows before the end are read, so the options' sizes hold for no other end."""
    others_bytes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Bytes that each of the other fetches still waits for, by endpoint."""


@dataclass(frozen=True, slots=True)
class Plan:
    choices: Mapping[int, int]
    """Maps every chunk's index to an index into its options, or to COMPUTE."""
    order: Order
    """"layers": the first layers of all chunks are read first, for an engine that follows layer by layer. "back": the
    last chunk is read first, each as a whole, while the engine computes the front; the meeting point may still be
    moved. "front": the first chunk is read first, each as a whole, for an engine that computes nothing until the fetch
    has ended, and then all behind the first chunk that it does not fetch."""
    predicted_s: float
    """Seconds from now to the end of the engine's last forward pass."""
    fetch_s: float
    """Seconds from now until the last fetched chunk is there."""
    bound_by: Bound
    """The stage that takes longest."""


class Planner(Protocol):
    """Stateless: any thread may call it, for several fetches at once."""

    def plan(self, work: Work) -> Plan: ...
