"""Which chunk goes first when room is needed.

base      what the tiers ask of a policy
lru       least recently used
s3_fifo   two queues and ghosts
value     cost saved per byte x attention score x frequency, with ageing
texts     which chunk stands before which in their text
order     a policy's order, the end of a text before its beginning
columns, ghosts, half_life    what they are made of: no object per chunk
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
