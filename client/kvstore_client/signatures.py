"""The keys by which a client signs chunks and tells which ones it trusts, and the chunks that it has refused."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from kvstore_client.reloaded_files import ReloadedFiles
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import SignatureError
from kvstore_codec.identity import ChunkId
from kvstore_codec.secret_file import read_secrets
from kvstore_codec.signing import verified
from kvstore_codec.signing_keys import SigningKeys

_SECRETS = ("signing keys", "the first key signs")
_MOST_REFUSED, _MOST_COPIES = 4096, 4


class Signatures:
    """Reads headers of chunks. With a file of keys, it refuses those that none of the keys has signed, and remembers
    the last ones, so that the client replaces them when it stores the chunk (`refused`). Without a file it accepts all.

    Thread-safe. A file that becomes unusable is logged once, and its last good content stays in use. Raises
    ConfigurationError when it is unusable at first."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._keys = ReloadedFiles(
            [file], lambda: None if file is None else SigningKeys(read_secrets(file, *_SECRETS)), clock
        )
        # Digests of refused headers, by chunk and encoding, the last refused chunk at the end.
        self._refused: OrderedDict[tuple[ChunkId, str], tuple[bytes, ...]] = OrderedDict()

    @property
    def keys(self) -> SigningKeys | None:
        """The keys as they are now. None without a file."""
        return self._keys.current

    def read(self, data: bytes) -> ChunkHeader:
        """The header in `data`, a chunk or its beginning. Raises ChunkFormatError or a subclass: with keys,
        SignatureError for a header that none of them has signed."""
        header, keys = read_header(data), self.keys
        if keys is None:
            return header
        try:
            return verified(header, data, keys)
        except SignatureError:
            self.refuse(header, data)
            raise

    def refuse(self, header: ChunkHeader, data: bytes) -> None:
        """Remembers a stored chunk, whose header was read from `data`, as one to replace."""
        name, digest = (header.chunk_id, header.encoding.name), blake3(data[: header.header_bytes]).digest()
        with self._lock:
            known = self._refused.pop(name, ())
            self._refused[name] = tuple(dict.fromkeys((*known, digest)))[-_MOST_COPIES:]
            while len(self._refused) > _MOST_REFUSED:
                self._refused.popitem(last=False)

    def take_refused(self, header: ChunkHeader) -> tuple[bytes, ...]:
        """The blake3 digests of refused headers of the same chunk in the same encoding, which a chunk with this header
        should replace. Forgets them."""
        if not self._refused:
            return ()
        with self._lock:
            return self._refused.pop((header.chunk_id, header.encoding.name), ())
