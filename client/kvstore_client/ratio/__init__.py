"""Ratio control: how much of a prompt is fetched, in which encodings, and how much is computed instead."""

from kvstore_client.ratio.adaptive import RatioController
from kvstore_client.ratio.base import COMPUTE, Bound, ChunkWork, Option, Order, Plan, Planner, Work
from kvstore_client.ratio.costs import Costs
from kvstore_client.ratio.fixed import FixedPlanner
from kvstore_client.ratio.kvfetcher import KVFetcherPlanner
from kvstore_client.ratio.links import DEFAULT_BANDWIDTH_Bps, LEAST_BUSY_Bps, Links
from kvstore_client.ratio.profile import CodecCost, PrefillCost, Profile, ProfileStore, profile_key

__all__ = [
    "COMPUTE",
    "Bound",
    "ChunkWork",
    "CodecCost",
    "Costs",
    "DEFAULT_BANDWIDTH_Bps",
    "FixedPlanner",
    "KVFetcherPlanner",
    "LEAST_BUSY_Bps",
    "Links",
    "Option",
    "Order",
    "Plan",
    "Planner",
    "PrefillCost",
    "Profile",
    "ProfileStore",
    "RatioController",
    "Work",
    "profile_key",
]
