"""Stores pages from their caller's views."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore_client.miss_reason import MissReason
from kvstore_client.owner_write import OutgoingChunk, keep_as
from kvstore_client.pages.base import PageResult
from kvstore_client.pages.context import PageContext
from kvstore_client.pages.jobs import Job
from kvstore_client.replicated_write import ReplicatedWrite, WriteResult
from kvstore_client.texts import TextPlaces
from kvstore_codec.errors import InvalidKVError, NodeUnavailableError
from kvstore_codec.identity import ChunkId
from kvstore_codec.page import write_page


class _WatchedWrite:
    """A write that is cancelled when the store closes."""

    def __init__(self, write: ReplicatedWrite) -> None:
        self._write = write
        self.is_closed = False

    def check(self) -> None:
        """Nothing to check: the write ends by its own deadline."""

    def cancel(self) -> None:
        self.is_closed = True
        self._write.cancel()


def put_pages(
    context: PageContext, job: Job, chunk_ids: Sequence[ChunkId], views: Sequence[memoryview | None]
) -> PageResult:
    """Store each page on all of its owners; None stands for a view that is not contiguous. A page with one copy counts
    as stored."""
    outcomes: list[str | None] = ["bad_view"] * len(chunk_ids)
    try:
        owners = context.view.writers([chunk_id.content_id for chunk_id in chunk_ids], job.left_s)
    except NodeUnavailableError as error:
        context.metrics.failures.warn(str(error), f"{error}: pages are not stored")
        return PageResult.failed(len(chunk_ids), "unreachable")
    replicas = context.view.membership().replicas
    write = ReplicatedWrite(context.view, context.settings, timeout_s=job.left_s)
    writing = _WatchedWrite(write)
    signatures = context.view.signatures
    sent: list[tuple[int, int]] = []
    written: list[WriteResult] = []
    with context.watch.over(writing):
        try:
            for index, (chunk_id, view) in enumerate(zip(chunk_ids, views, strict=True)):
                if view is None or not owners[index]:
                    outcomes[index] = "paused" if view is not None else "bad_view"
                    continue
                try:
                    header, parts = write_page(
                        context.namespace, chunk_id, context.encoding, view, signatures.keys
                    )
                except InvalidKVError:
                    outcomes[index] = "wrong_size"
                    continue
                sent.append((index, header.size_bytes))
                keep = keep_as(context.settings, context.page_tokens, signatures.take_refused(header))
                write.put(OutgoingChunk.with_header(header, parts, keep), owners[index], TextPlaces((), ()))
        except NodeUnavailableError:  # the client was closed
            writing.cancel()
        except BaseException:
            write.cancel()
            raise
        finally:
            written = write.finish()
    broke = "closed" if writing.is_closed else next(iter(write.failures), "unreachable")
    stored_bytes = sparse = 0
    for (index, size_bytes), page in zip(sent, written, strict=False):
        stored_bytes += page.copies * size_bytes
        sparse += 0 < page.copies < replicas
        if page.copies:
            outcomes[index] = None
        else:
            outcomes[index] = (page.refusals[0] if page.refusals else broke).removeprefix("store_")
    for index, _ in sent[len(written) :]:
        outcomes[index] = "closed"
    for reason, detail in write.details.items():
        if reason is not MissReason.STORE_CANCELLED:
            context.metrics.failures.warn(f"page_{reason}", detail)
    if sent:
        context.metrics.stored(0, stored_bytes, context.encoding)
    context.metrics.under_replicated(sparse)
    return PageResult.of(outcomes)
