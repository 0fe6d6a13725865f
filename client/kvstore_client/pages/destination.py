"""Memory for the bytes of a read: pages go to their caller's views, the frame headers to scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_client.pages.find import StoredPage
from kvstore_client.transport.memory import LARGEST_BYTES
from kvstore_codec.errors import TransferError
from kvstore_codec.page import RAW, decode_page, verify_raw_page
from kvstore_codec.payload import OPENING_BYTES


@dataclass(frozen=True, slots=True)
class WantedPage:
    """A page to read into `view`, writable bytes of its size."""

    index: int
    """Index in its job."""
    stored: StoredPage
    view: memoryview


class _Frame:
    """The incoming frame of one page."""

    def __init__(self, page: WantedPage) -> None:
        self._page = page
        self.left_bytes = page.stored.header.frame_lengths[0]
        if page.stored.header.encoding == RAW:
            self._first = memoryview(bytearray(OPENING_BYTES))
            self._parts = [page.view, self._first]
        else:
            self._first = memoryview(bytearray(self.left_bytes))
            self._parts = [self._first]

    def take(self, size_bytes: int) -> memoryview:
        """Memory for the next bytes of the frame, at most `size_bytes`."""
        part = self._parts.pop()
        if len(part) > size_bytes:
            self._parts.append(part[size_bytes:])
            part = part[:size_bytes]
        self.left_bytes -= len(part)
        return part

    def finish(self) -> None:
        """Raises a ChunkFormatError unless the page is in its view."""
        page, header = self._page, self._page.stored.header
        if header.encoding == RAW:
            verify_raw_page(header, self._first, page.view)
        else:
            decode_page(header, self._first, page.view)


class Destination:
    """Memory of one read, whose ranges are the pages in order. Used by one thread."""

    def __init__(self, pages: Sequence[WantedPage]) -> None:
        self._pages = pages
        self.done = 0
        """Number of pages that are finished, with or without success."""
        self._lent: memoryview | None = None
        self._frame = _Frame(pages[0])

    @property
    def page(self) -> WantedPage:
        """The page whose bytes arrive next."""
        return self._pages[self.done]

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the page have arrived."""
        return not self._frame.left_bytes

    def take(self, size_bytes: int) -> memoryview:
        """Memory for the next bytes; the transport says that at least `size_bytes` of the range are left. Raises
        TransferError when that is not the expected number."""
        left_bytes = self._frame.left_bytes if self.done < len(self._pages) else 0
        if not left_bytes or size_bytes != min(left_bytes, LARGEST_BYTES):
            raise TransferError(
                "protocol", f"a page with {left_bytes} bytes left is announced with {size_bytes}"
            )
        self._lent = self._frame.take(size_bytes)
        return self._lent

    def arrived(self, data: memoryview) -> None:
        """Accept a piece of the page: it is in place already, or copied there."""
        if data is self._lent:
            return
        if len(data) > self._frame.left_bytes:
            raise TransferError("protocol", "a page arrives with more bytes than its size")
        while data:
            part = self._frame.take(len(data))
            part[:] = data[: len(part)]
            data = data[len(part) :]

    def finish_page(self) -> None:
        """Verify a page whose bytes have all arrived. Raises a ChunkFormatError when they are not the stored bytes, and
        InvalidKVError for a page of another size than its view."""
        self._frame.finish()

    def next_page(self) -> None:
        self.done += 1
        self._lent = None
        if self.done < len(self._pages):
            self._frame = _Frame(self._pages[self.done])
