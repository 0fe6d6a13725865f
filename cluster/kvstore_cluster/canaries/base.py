"""What is known of a model's canary without reading it, and where copies may be kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MAX_TEXT_BYTES = 256
"""Of each text in an Origin."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The worker that computed something, in its own words."""

    model_id: str = ""
    host: str = ""
    pid: int = 0
    software: str = ""
    """Names and versions, such as `torch 2.13.0, transformers 5.23.0`."""
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """One model's canary. `model_digest` has 32 bytes."""

    model_digest: bytes
    generation: int
    """Another one for each canary that the model ever had. Chunks are named after it."""
    origin: Origin = Origin()
    created_unix_s: float = 0.0
    size_bytes: int = 0
    """0: there is none at present; the next worker makes it."""
    client: str = ""
    """Where it came from, as the coordinator saw it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker that computes something else than the canary says, and therefore reuses nothing."""

    origin: Origin
    generation: int
    message: str
    last_unix_s: float
    times: int = 1


class CanaryMirror(Protocol):
    """Keeps copies elsewhere. All methods raise CatalogueError when that cannot be reached."""

    def keep(self, model_digest: bytes, generation: int, content: bytes) -> None:
        """In place of what it kept of this model."""

    def forget(self, model_digest: bytes) -> None: ...

    def copies(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Model digest, generation and content of each, as they were kept."""
