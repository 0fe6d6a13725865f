"""Reads pages directly into their caller's views, from any node that has them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.lookup import release
from kvstore_client.miss_reason import MissReason
from kvstore_client.pages.base import PageResult
from kvstore_client.pages.context import PageContext
from kvstore_client.pages.destination import Destination, WantedPage
from kvstore_client.pages.find import PageSearch, StoredPage
from kvstore_client.pages.jobs import Job
from kvstore_client.request_id import current_request_id
from kvstore_client.transport import ReadStream
from kvstore_codec.errors import (
    CodecError,
    InvalidKVError,
    NodeUnavailableError,
    SignatureError,
    TransferError,
)
from kvstore_codec.identity import ChunkId
from kvstore_codec.page import may_fill


class _WatchedRead:
    """A watched read: it is cancelled when nothing arrives for `patience_s`."""

    def __init__(self, stream: ReadStream, patience_s: float) -> None:
        self._stream, self._patience_s = stream, patience_s
        self.moved_at_s = time.monotonic()
        self.is_silent = self.is_closed = False

    def check(self) -> None:
        if time.monotonic() - max(self.moved_at_s, self._stream.moved_at_s) > self._patience_s:
            self.is_silent = True
            self._stream.cancel()

    def cancel(self) -> None:
        self.is_closed = True
        self._stream.cancel()


class GetPages:
    """One get job. No view is written to after `run` has returned."""

    def __init__(
        self, context: PageContext, chunk_ids: Sequence[ChunkId], views: Sequence[memoryview | None]
    ) -> None:
        """`views` are contiguous writable bytes; None for a view that is not."""
        self._context, self._chunk_ids, self._views = context, chunk_ids, views
        self._outcomes: list[str | None] = ["not_stored"] * len(chunk_ids)
        self._deadline_s = 0.0

    def run(self, job: Job) -> PageResult:
        context = self._context
        self._deadline_s = job.deadline_s
        search = PageSearch(
            context.view, context.settings, context.metrics, context.namespace, self._chunk_ids
        )
        found: dict[int, StoredPage] = {}
        unknown: list[int] = []
        for index, (chunk_id, view) in enumerate(zip(self._chunk_ids, self._views, strict=True)):
            if view is None:
                self._outcomes[index] = "bad_view"
            elif (stored := context.locks.find(chunk_id)) is not None:
                found[index] = stored
            else:
                unknown.append(index)
        try:
            if unknown:
                search.look(unknown, job.left_s)
                self._note(unknown, search)
            self._bring({**found, **search.found}, search)
        finally:
            release(context.view, search.uses(search.found))
        return PageResult.of(self._outcomes)

    def _note(self, indices: Sequence[int], search: PageSearch) -> None:
        for index in indices:
            if index not in search.found:
                self._outcomes[index] = search.why_not

    def _bring(self, places: Mapping[int, StoredPage], search: PageSearch) -> None:
        """Read pages from their nodes, and failed ones from their other readers. A node that was abandoned for its
        silence is asked again, with a longer limit, for pages that no other node has."""
        tried: dict[int, list[Member]] = {}
        silent: dict[int, StoredPage] = {}
        hurried = self._context.view.membership().replicas > 1 if places else False
        while places:
            failed = self._read_all(places, hurried=hurried)
            places = {index: page for index, page in places.items() if index in failed}
            for index, page in places.items():
                self._outcomes[index] = failed[index]
                tried.setdefault(index, []).append(page.member)
                if failed[index] == "silent":
                    silent[index] = page
            again = [index for index in places if failed[index] not in ("wrong_size", "timeout", "closed")]
            if not again or not self._left_s():
                break
            for index in again:
                search.found.pop(index, None)
            search.look(again, self._left_s(), tried)
            places = {index: search.found[index] for index in again if index in search.found}
            if places:
                self._context.metrics.failed_over(MissReason.of_fetch(failed[next(iter(places))]))
            elif hurried and silent:
                hurried = False
                places, silent = {i: p for i, p in silent.items() if self._outcomes[i] is not None}, {}

    def _read_all(self, places: Mapping[int, StoredPage], *, hurried: bool) -> dict[int, str]:
        """Read from all nodes in parallel. Returns the reasons for missing pages, by index."""
        groups: dict[str, list[WantedPage]] = {}
        failed: dict[int, str] = {}
        for index, page in places.items():
            view = self._views[index]
            if view is not None and may_fill(page.header, view.nbytes):
                groups.setdefault(page.member.node_id, []).append(WantedPage(index, page, view))
            else:
                failed[index] = "wrong_size"
        *others, last = groups.values() if groups else [[]]
        reads = [(pages, self._begin_read(pages, hurried=hurried)) for pages in others]
        if last:
            failed |= self._read(last, hurried=hurried)
        for pages, read in reads:
            # Reads that no other thread has begun run here.
            failed |= self._read(pages, hurried=hurried) if read.cancel() else read.result()
        return failed

    def _begin_read(self, pages: Sequence[WantedPage], *, hurried: bool) -> Future[dict[int, str]]:
        """Start `_read` in another thread; it can be cancelled until that thread takes it. The future is not the
        executor's, which keeps the work even if it raises for lack of a thread: the work may then still run."""
        read: Future[dict[int, str]] = Future()

        def run() -> None:
            if read.set_running_or_notify_cancel():
                read.set_result(self._read(pages, hurried=hurried))

        with suppress(RuntimeError):  # no thread left, or the store was closed
            self._context.readers.submit(run)
        return read

    def _read(self, pages: Sequence[WantedPage], *, hurried: bool) -> dict[int, str]:
        """Read from one node. Returns the reasons for missing pages, by index. Never raises: other threads may read for
        the same job, which must not end before they do."""
        try:
            return self._read_from_node(pages, hurried=hurried)
        except Exception as error:  # a bug in this package costs only this node's pages
            self._context.metrics.failures.warn(
                "page_internal_error", f"a read of {len(pages)} pages failed: {error}", error
            )
            return {page.index: "internal_error" for page in pages}

    def _read_from_node(self, pages: Sequence[WantedPage], *, hurried: bool) -> dict[int, str]:
        context, member = self._context, pages[0].stored.member
        if not self._left_s():
            return {page.index: "timeout" for page in pages}
        destination = Destination(pages)
        try:
            stream = context.view.transport(member).read(
                _request(pages, self._chunk_ids, context.view.tenant), self._left_s(), destination
            )
        except NodeUnavailableError:
            return {page.index: "closed" for page in pages}
        settings = context.settings
        reading = _WatchedRead(
            stream, settings.timeouts.failover_s if hurried else settings.timeouts.fetch_stall_s
        )
        failed: dict[int, str] = {}
        reason = "protocol"
        try:
            with context.watch.over(reading):
                for piece in stream:
                    reading.moved_at_s = time.monotonic()
                    if destination.done == len(pages) or piece.range != destination.done:
                        break
                    page = destination.page
                    if piece.status != pb.READ_STATUS_OK:
                        failed[page.index] = "gone"
                    else:
                        destination.arrived(piece.data)
                        if not destination.is_whole:
                            continue
                        outcome = self._finished(destination, member)
                        if outcome is not None:
                            failed[page.index] = outcome
                    destination.next_page()
        except TransferError as error:
            reason = "closed" if reading.is_closed else "silent" if reading.is_silent else error.reason
            if self._left_s() and not reading.is_closed:
                why = f"a read of pages from the storage node at {member.endpoint} broke off ({reason}): {error}"
                context.metrics.failures.warn(f"page_{reason}", why)
                context.view.pause(member.endpoint, why, until_it_answers=reason == "unreachable")
                context.view.refresh()
        finally:
            stream.cancel()
        return failed | {page.index: reason for page in pages[destination.done :]}

    def _finished(self, destination: Destination, member: Member) -> str | None:
        """Why a fully received page cannot be used; None for one that is in its view."""
        page = destination.page
        try:
            destination.finish_page()
        except InvalidKVError:
            return "wrong_size"
        except CodecError as error:
            why = f"a page from the storage node at {member.endpoint} is not used: {error}"
            reason = MissReason.of_frames(error)
            if isinstance(error, SignatureError):
                self._context.view.signatures.refuse(page.stored.header, page.stored.header_data)
                self._context.metrics.missed(reason, detail=why)
            else:
                self._context.metrics.failures.warn(f"page_{reason}", why)
            return reason
        self._outcomes[page.index] = None
        header = page.stored.header
        self._context.metrics.received(header.frame_lengths[0])
        self._context.metrics.fetched_bytes({header.encoding: header.frame_lengths[0]})
        return None

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())


def _request(pages: Sequence[WantedPage], chunk_ids: Sequence[ChunkId], tenant: str) -> pb.ReadRequest:
    request = pb.ReadRequest(tenant=tenant, request_id=current_request_id())
    for number, page in enumerate(pages):
        chunk_id = chunk_ids[page.index]
        request.chunks.add(content_id=chunk_id.content_id, prefix_id=chunk_id.prefix_id)
        request.encodings.append(page.stored.header.encoding.name)
        request.ranges.add(chunk=number, first_frame=0, frame_count=1)
    return request
