"""The keys by which a client signs chunks and tells which ones it trusts, and the chunks that it has refused."""

import binascii
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from kvstore_client.reloaded_files import ReloadedFiles
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import ConfigurationError, SignatureError
from kvstore_codec.identity import ChunkId
from kvstore_codec.signing import verified
from kvstore_codec.signing_keys import SECRET_BYTES, SigningKeys

MOST_KEYS = 16
_MOST_FILE_BYTES = 4096
_MOST_REFUSED, _MOST_COPIES = 4096, 4


class Signatures:
    """Reads headers of chunks. With a file of keys, it refuses those that none of the keys has signed, and remembers
    the last ones, so that the client replaces them when it stores the chunk (`refused`). Without a file it accepts all.

    Thread-safe. A file that becomes unusable is logged once, and its last good content stays in use. Raises
    ConfigurationError when it is unusable at first."""

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._keys = ReloadedFiles([file], lambda: None if file is None else _read_keys(file), clock)
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


def _read_keys(path: Path) -> SigningKeys:
    """The keys in a file, one a line. Raises ConfigurationError, which does not quote them."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read the signing keys in {path}: {error.strerror}") from error
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    try:
        secrets = [binascii.unhexlify(line) for line in lines]
    except binascii.Error:
        secrets = []
    if (
        not 1 <= len(secrets) <= MOST_KEYS
        or len(content) > _MOST_FILE_BYTES
        or any(len(secret) != SECRET_BYTES for secret in secrets)
    ):
        raise ConfigurationError(
            f"{path} has no signing keys: it must have 1 to {MOST_KEYS} lines of {2 * SECRET_BYTES} hexadecimal "
            "digits, such as `openssl rand -hex 32` prints; the first key signs"
        )
    return SigningKeys(secrets)
