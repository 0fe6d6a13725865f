"""Lookup of stored pages and their nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.replicas import Lease, Search
from kvstore_client.settings import ClientSettings
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import CodecError, NodeUnavailableError, SignatureError
from kvstore_codec.identity import ChunkId
from kvstore_codec.page import ENCODINGS, PageNamespace, require_page

_ENCODINGS = tuple(encoding.name for encoding in ENCODINGS)


@dataclass(frozen=True, slots=True)
class StoredPage:
    """A stored page: its header and the node that holds it."""

    header: ChunkHeader
    header_data: bytes
    member: Member


class PageSearch:
    """Looks pages up on all their readers; used by one thread. Found pages are leased until `leases` are released."""

    def __init__(
        self,
        view: ClusterView,
        settings: ClientSettings,
        metrics: ClientMetrics,
        namespace: PageNamespace,
        chunk_ids: Sequence[ChunkId],
    ) -> None:
        self.found: dict[int, StoredPage] = {}
        """By index of the page in `chunk_ids`."""
        self.leases: list[Lease] = []
        self.why_not = "not_stored"
        """Reason for pages that were not found."""
        self._view, self._settings, self._metrics = view, settings, metrics
        self._namespace, self._chunk_ids = namespace, chunk_ids

    def look(
        self,
        wanted: Iterable[int],
        timeout_s: float,
        tried: Mapping[int, Iterable[Member]] | None = None,
    ) -> None:
        """Look these pages up, except at the members in `tried`, for at most `timeout_s` and `lookup_timeout_s`."""
        deadline_s = time.monotonic() + min(timeout_s, self._settings.timeouts.lookup_s)
        wanted = list(wanted)
        self._look(wanted, deadline_s, tried)
        # All owners of a page may have failed and rejoined at other addresses: only the coordinator knows.
        missing = [index for index in wanted if index not in self.found]
        if missing and self._view.renew(deadline_s - time.monotonic()):
            self._look(missing, deadline_s, tried)

    def uses(self, used: Iterable[int]) -> list[Lease]:
        """The leases, marked with the used pages among those found."""
        holders = {index: self.found[index].member for index in used}
        leases = []
        for lease in self.leases:
            bits = np.array([holders.get(index) == lease.member for index in lease.asked], np.bool_)
            leases.append(lease._replace(used=np.packbits(bits, bitorder="little").tobytes()))
        return leases

    def _look(
        self, wanted: Sequence[int], deadline_s: float, tried: Mapping[int, Iterable[Member]] | None
    ) -> None:
        timeout_s = deadline_s - time.monotonic()
        if timeout_s <= 0:
            self.why_not = "timeout"
            return
        search = Search(self._view, self._settings, self._chunk_ids, _ENCODINGS, self._take)
        try:
            search.run(wanted, tried, timeout_s)
        except NodeUnavailableError as error:
            self.why_not = "unreachable"
            self._metrics.failures.warn(
                str(error), f"{error}: pages there are neither read nor stored by this client for now"
            )
        else:
            self.why_not = "unreachable" if search.failures else "not_stored"
            if not search.asked and not tried:
                self.why_not = "paused"
        finally:
            self.leases += search.leases

    def _take(self, index: int, member: Member, answer: pb.LookupAnswer) -> bool:
        try:
            header = self._view.signatures.read(answer.header)
            require_page(header, self._namespace, self._chunk_ids[index])
        except CodecError as error:
            reason = MissReason.of_header(error)
            why = f"an answer of the storage node at {member.endpoint} cannot be used: {error}"
            if isinstance(error, SignatureError):
                self._metrics.missed(reason, detail=why)
            else:
                self._metrics.failures.warn(f"page_{reason}", why)
            return False
        self.found[index] = StoredPage(header, answer.header, member)
        return True
