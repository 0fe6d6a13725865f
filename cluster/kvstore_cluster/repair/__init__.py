"""Repair: every chunk on all of its owners again after nodes came, went or shall go."""

from kvstore_cluster.repair.base import Outcome, PeerNodes, Stock
from kvstore_cluster.repair.worker import RepairWorker

__all__ = ["Outcome", "PeerNodes", "RepairWorker", "Stock"]
