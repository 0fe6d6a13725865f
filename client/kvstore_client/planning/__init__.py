"""Planning of fetches: which chunks are fetched in which encoding, and which the engine computes instead."""

from kvstore_client.planning.adaptive import AdaptivePlanner
from kvstore_client.planning.base import COMPUTE, Bound, ChunkWork, Option, Order, Plan, Planner, Work
from kvstore_client.planning.costs import Costs
from kvstore_client.planning.fixed import FixedPlanner
from kvstore_client.planning.kvfetcher import KVFetcherPlanner
from kvstore_client.planning.leading import LeadingPlanner
from kvstore_client.planning.links import DEFAULT_BANDWIDTH_Bps, LEAST_BUSY_Bps, Links
from kvstore_client.planning.profile import CodecCost, PrefillCost, Profile, ProfileStore, profile_key
from kvstore_client.planning.race import Race

__all__ = [
    "AdaptivePlanner",
    "COMPUTE",
    "Bound",
    "ChunkWork",
    "CodecCost",
    "Costs",
    "DEFAULT_BANDWIDTH_Bps",
    "FixedPlanner",
    "KVFetcherPlanner",
    "LEAST_BUSY_Bps",
    "LeadingPlanner",
    "Links",
    "Option",
    "Order",
    "Plan",
    "Planner",
    "PrefillCost",
    "Profile",
    "ProfileStore",
    "Race",
    "Work",
    "profile_key",
]
