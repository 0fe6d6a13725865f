"""Parts that the jobs of one page store share."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.pages.locks import PageLocks
from kvstore_client.settings import ClientSettings
from kvstore_client.watch import Watch
from kvstore_codec.encoding import Encoding
from kvstore_codec.page import PageNamespace


@dataclass(frozen=True, slots=True)
class PageContext:
    view: ClusterView
    settings: ClientSettings
    metrics: ClientMetrics
    namespace: PageNamespace
    encoding: Encoding
    """Encoding of new pages."""
    page_tokens: int
    locks: PageLocks
    watch: Watch
    readers: Executor
    """Threads that read from all nodes of a job but the first."""
