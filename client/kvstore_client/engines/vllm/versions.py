"""Which versions of vLLM the adapter works with, and in what they differ."""

import re
from dataclasses import dataclass

from kvstore_codec.errors import UnsupportedEngineError


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """What one release series of vLLM asks of a connector."""

    series: str
    names_hit_sources: bool
    """The engine asks which cache tier each external hit came from, and which cache groups a load restores."""


_SUPPORTED = (
    EngineVersion("0.30", names_hit_sources=False),
    EngineVersion("0.31", names_hit_sources=False),
    EngineVersion("0.32", names_hit_sources=True),
    EngineVersion("0.33", names_hit_sources=True),
)


def supported_version(version: str) -> EngineVersion:
    """The series of `vllm.__version__`. Raises UnsupportedEngineError when it is not supported."""
    found = re.match(r"\d+\.\d+(?=\.)", version)
    for known in _SUPPORTED:
        if found and found[0] == known.series:
            return known
    raise UnsupportedEngineError(
        f"vLLM {version} is not supported; the supported releases are {', '.join(v.series for v in _SUPPORTED)}"
    )
