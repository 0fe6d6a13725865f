"""vLLM's word for where reused tokens come from. Since 0.32 its metrics count them by source."""

from typing import Any

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # before 0.32
    OTHER_MACHINES: Any = None
else:
    OTHER_MACHINES = CacheHitSource.EXTERNAL_UNSPECIFIED
