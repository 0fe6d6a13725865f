"""The catalogue: the durable state of the coordinator, in a file or in Redis."""

from kvstore_cluster.catalogue.base import Catalogue, ClusterState, NodeRecord
from kvstore_cluster.catalogue.file import FileCatalogue
from kvstore_cluster.catalogue.redis import RedisCatalogue

__all__ = ["Catalogue", "ClusterState", "FileCatalogue", "NodeRecord", "RedisCatalogue"]
