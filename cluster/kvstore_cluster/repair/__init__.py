"""Repair: every chunk on all of its owners again after nodes came, went or shall go."""

from kvstore_cluster.repair.base import LocalInventory, Outcome, PeerNodes
from kvstore_cluster.repair.worker import RepairWorker

__all__ = ["Outcome", "PeerNodes", "RepairWorker", "LocalInventory"]
