"""Which versions of vLLM the adapter works with, and in what they differ."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore_codec.errors import UnsupportedEngineError


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """What one release series of vLLM asks of a connector."""

    series: str
    has_cpu_wheel: bool
    """Whether the tests can run it on a CPU."""
    new_hooks: Mapping[str, str] = field(default_factory=dict)
    """Hooks that the series before does not have, each with the connector's answer in words."""


SUPPORTED = (
    EngineVersion(
        "0.30",
        has_cpu_wheel=True,
        new_hooks={
            "get_transfer_results": "the loads that have ended; what failed is told by block, so that what has "
            "arrived is kept",
            "finish_forward": "nothing: KV is copied when the step has ended",
        },
    ),
    EngineVersion(
        "0.31",
        has_cpu_wheel=True,
        new_hooks={"get_mem_pool_context": "none: KV lies in the engine's own memory"},
    ),
    EngineVersion(
        "0.32",
        has_cpu_wheel=True,
        new_hooks={
            "get_loaded_kv_cache_group_ids": "the only group of the model",
            "get_external_cache_hit_sources": "all loaded tokens are `external_unspecified`, vLLM's word for a store "
            "on other machines",
        },
    ),
    EngineVersion(
        "0.33",
        has_cpu_wheel=False,
        new_hooks={
            "supports_sleep_mode": "yes",
            "unregister_kv_caches": "nothing: no load is under way, and the memory keeps its addresses",
            "restore_kv_caches": "nothing",
        },
    ),
)


def supported_version(version: str) -> EngineVersion:
    """The series of `vllm.__version__`. Raises UnsupportedEngineError when it is not supported."""
    found = re.match(r"\d+\.\d+(?=\.)", version)
    for known in SUPPORTED:
        if found and found[0] == known.series:
            return known
    raise UnsupportedEngineError(
        f"vLLM {version} is not supported; the supported releases are {', '.join(v.series for v in SUPPORTED)}"
    )
