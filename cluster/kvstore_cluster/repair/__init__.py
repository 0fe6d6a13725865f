"""Repair: copies chunks to owners that lack them, after nodes joined, failed or started draining."""

from kvstore_cluster.repair.base import LocalInventory, Outcome, PeerNodes
from kvstore_cluster.repair.worker import RepairWorker

__all__ = ["Outcome", "PeerNodes", "RepairWorker", "LocalInventory"]
