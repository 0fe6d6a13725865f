"""What a run of benchmarks/vllm_ttft.py measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Options:
    model: Path
    model_name: str
    links: Sequence[float | None]
    """Bandwidths in bit/s; None is the unshaped link."""
    tokens: Sequence[int]
    """Lengths of the prompts."""
    rounds: int
    texts: int
    """Different prompts of each length. The rounds take them in turn."""
    answer_tokens: int
    budget_s: float | None = None
    """Time for all rounds, in seconds: nothing begins that is expected to end later. None: no limit."""
    silence_s: float = 240.0
    """A request has failed when nothing arrives for so long."""
    dtype: str = "bfloat16"
    vllm_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        if not self.tokens or min(self.tokens) <= CHUNK_TOKENS:
            raise ConfigurationError(
                f"prompts need more than {CHUNK_TOKENS} tokens, the smallest amount that is reused"
            )
