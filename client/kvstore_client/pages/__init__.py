"""Page store: `PageStore`, for engines with opaque keys and whole pages. This package imports no engine."""

from kvstore_client.pages.base import JobId, PageResult
from kvstore_client.pages.store import PageStore
from kvstore_codec.page import PageNamespace

__all__ = ["JobId", "PageNamespace", "PageResult", "PageStore"]
