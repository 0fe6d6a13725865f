"""In what the interface of vLLM's tiers differs between the supported releases."""

from dataclasses import fields
from typing import Any

from vllm.v1.kv_offload.tiering.base import JobResult

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # before 0.32, whose metrics count reused tokens by their source
    OTHER_MACHINES: Any = None
else:
    OTHER_MACHINES = CacheHitSource.EXTERNAL_UNSPECIFIED

_COUNTS_BYTES = "transfer_bytes" in {field.name for field in fields(JobResult)}
"""Since 0.31."""


def job_result(*told: Any, transfer_bytes: int, **more: Any) -> JobResult:
    """A result of a job, with the bytes where vLLM asks for them."""
    if _COUNTS_BYTES:
        more["transfer_bytes"] = transfer_bytes
    return JobResult(*told, **more)
