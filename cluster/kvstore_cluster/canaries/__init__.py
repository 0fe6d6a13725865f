"""Canaries: for each model, the KV of one fixed text, which every worker compares with the KV that it computes."""

from kvstore_cluster.canaries.base import CanaryMirror, CanaryRecord, Origin, Refusal, canary_key
from kvstore_cluster.canaries.redis import RedisCanaryMirror
from kvstore_cluster.canaries.refusals import Refusals
from kvstore_cluster.canaries.registry import CanaryRegistry

__all__ = [
    "CanaryMirror",
    "CanaryRecord",
    "CanaryRegistry",
    "Origin",
    "RedisCanaryMirror",
    "Refusal",
    "Refusals",
    "canary_key",
]
