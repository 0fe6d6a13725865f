"""Where the bytes of a read go: the opening of each frame aside, and the page into its caller's view."""

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
    """A page that is to be read into `view`, writable bytes of its size."""

    index: int
    """In its job."""
    stored: StoredPage
    view: memoryview


class _Frame:
    """The frame of one page on its way in."""

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
        """The next bytes of the frame, `size_bytes` at most."""
        part = self._parts.pop()
        if len(part) > size_bytes:
            self._parts.append(part[size_bytes:])
            part = part[:size_bytes]
        self.left_bytes -= len(part)
        return part

    def finish(self) -> None:
        """Raises ChunkFormatError children unless the page is in its view."""
        page, header = self._page, self._page.stored.header
        if header.encoding == RAW:
            verify_raw_page(header, self._first, page.view)
        else:
            decode_page(header, self._first, page.view)


class Destination:
    """The memory of one read, whose ranges are the pages in order. Used by one thread."""

    def __init__(self, pages: Sequence[WantedPage]) -> None:
        self._pages = pages
        self.done = 0
        """Pages that are over, one way or the other."""
        self._lent: memoryview | None = None
        self._frame = _Frame(pages[0])

    @property
    def page(self) -> WantedPage:
        """The one whose bytes come now."""
        return self._pages[self.done]

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the page have come."""
        return not self._frame.left_bytes

    def take(self, size_bytes: int) -> memoryview:
        """Memory for the next bytes, of which a transport says that `size_bytes` or more are left of the range. Raises
        TransferError where it is another number than there should be."""
        left_bytes = self._frame.left_bytes if self.done < len(self._pages) else 0
        if not left_bytes or size_bytes != min(left_bytes, LARGEST_BYTES):
            raise TransferError(
                "protocol", f"a page of which {left_bytes} bytes are left comes with {size_bytes}"
            )
        self._lent = self._frame.take(size_bytes)
        return self._lent

    def arrived(self, data: memoryview) -> None:
        """A piece of the page has come: in place, or else it is copied there."""
        if data is self._lent:
            return
        if len(data) > self._frame.left_bytes:
            raise TransferError("protocol", "a page comes with more bytes than it has")
        while data:
            part = self._frame.take(len(data))
            part[:] = data[: len(part)]
            data = data[len(part) :]

    def finish_page(self) -> None:
        """All bytes of the page have come. Raises ChunkFormatError children unless they are those that were stored, and
        InvalidKVError for a page of another size than its view."""
        self._frame.finish()

    def next_page(self) -> None:
        self.done += 1
        self._lent = None
        if self.done < len(self._pages):
            self._frame = _Frame(self._pages[self.done])
