"""Eviction: which chunks leave a full tier first.

base      the interface of an eviction policy
lru       least recently used
s3_fifo   two FIFO queues and a ghost table
value     saved cost per byte x attention score x frequency, with ageing
texts     links from each chunk to its predecessor in the text
order     the order of a policy, changed so that the end of a text leaves before its beginning
columns, ghosts, half_life    data structures of the policies, without a Python object per chunk
"""

from collections.abc import Callable, Mapping

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.lru import LeastRecentlyUsed
from kvstore_cluster.eviction.order import EvictionOrder
from kvstore_cluster.eviction.s3_fifo import S3Fifo
from kvstore_cluster.eviction.texts import TextLinks
from kvstore_cluster.eviction.value import ValueAware

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "s3-fifo": S3Fifo,
    "value": ValueAware,
}
DEFAULT_POLICY = "value"

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "EvictionOrder",
    "EvictionPolicy",
    "LeastRecentlyUsed",
    "S3Fifo",
    "TextLinks",
    "ValueAware",
]
