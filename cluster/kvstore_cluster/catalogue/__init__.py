"""The coordinator's durable state: what it is, and where it is kept (a file, or Redis)."""

from kvstore_cluster.catalogue.base import Catalogue, ClusterState, NodeRecord
from kvstore_cluster.catalogue.file import FileCatalogue
from kvstore_cluster.catalogue.redis import RedisCatalogue

__all__ = ["Catalogue", "ClusterState", "FileCatalogue", "NodeRecord", "RedisCatalogue"]
