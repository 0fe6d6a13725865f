"""The layouts of a store's segments: which one a new segment gets, and which one a segment in the folder has."""

import os
import secrets
import struct
from pathlib import Path

from kvstore_cluster.disk.encrypted_layout import UNIT_DATA_BYTES, EncryptedLayout, encrypted_blocks_of
from kvstore_cluster.disk.layout import PlainLayout, RecordLayout
from kvstore_cluster.disk.record import blocks_of
from kvstore_cluster.disk.segment_format import ENCRYPTED_VERSION, VERSION, first_block, opening, sectors
from kvstore_cluster.encryption import KeySource, key_of
from kvstore_cluster.encryption.keys import SALT_BYTES, TAG_BYTES, first_name
from kvstore_codec.errors import ChecksumError

_ENCRYPTED = struct.Struct(f"<32x{SALT_BYTES}s{TAG_BYTES}s")
"""Salt and tag, behind the opening."""


class SegmentLayouts:
    """Chooses layouts. With `keys`, new segments are encrypted with the first of them. Thread-safe."""

    def __init__(self, keys: KeySource | None = None) -> None:
        self._keys = keys

    @property
    def read_unit_bytes(self) -> int:
        """Reads from an encrypted chunk are best aligned to this. 1 for plain segments."""
        return 1 if self._keys is None else UNIT_DATA_BYTES

    def new(self, number: int) -> tuple[RecordLayout, bytes]:
        """The layout of the new segment `number`, and its first block."""
        if self._keys is None:
            seed = secrets.randbits(64)
            return PlainLayout(seed), first_block(opening(VERSION, number, seed))
        key, salt = self._keys().first, os.urandom(SALT_BYTES)
        layout = EncryptedLayout(number, key, salt)
        said = opening(ENCRYPTED_VERSION, number, int.from_bytes(key.id, "little")) + salt
        return layout, first_block(said + layout.tag(said))

    def existing(self, block: memoryview, number: int, path: Path) -> RecordLayout | None:
        """The layout of the segment `number` in the file `path`, according to its first block. None when the block is
        damaged. Raises EncryptionKeyError when its key is not given, and DiskFailedError for an unknown version."""
        for version, named, sector in sectors(block, number):
            if version == VERSION:
                return PlainLayout(named)
            keys = None if self._keys is None else self._keys()
            key = key_of(keys, named.to_bytes(8, "little"), path, path.parent)
            salt, tag = _ENCRYPTED.unpack_from(sector)
            layout = EncryptedLayout(number, key, salt)
            try:
                layout.verify(bytes(sector[: _ENCRYPTED.size - len(tag)]), tag)
            except ChecksumError:
                continue
            return layout
        return None

    @property
    def key_name(self) -> str:
        """Id of the key of a new segment, empty for a plain one. May block: the key file is read again."""
        return first_name(self._keys)

    def data_blocks(self, size_bytes: int) -> int:
        """Number of data blocks of a chunk in a new segment."""
        return blocks_of(size_bytes) if self._keys is None else encrypted_blocks_of(size_bytes)
