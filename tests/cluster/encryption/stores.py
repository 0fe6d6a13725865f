"""Keys for tests, and stores that encrypt."""

from pathlib import Path

from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk.file import SegmentFile
from kvstore_cluster.disk.folder import OpenFile
from kvstore_cluster.encryption import EncryptionKeys
from tests.cluster.disk.chunks import append, contents
from tests.sample_chunk import SampleChunk, sample_chunk

OLD, NEW = b"\1" * 32, b"\2" * 32
LIMIT = 8 << 20


def keys_of(*secrets: bytes) -> EncryptionKeys:
    return EncryptionKeys(secrets)


def name_of(secret: bytes) -> str:
    return EncryptionKeys([secret]).first.name


def encrypted(
    folder: Path,
    *secrets: bytes,
    limit_bytes: int = LIMIT,
    segment_bytes: int = 256 << 20,
    open_file: OpenFile = SegmentFile,
) -> SegmentStore:
    """A store with these keys, or a plain one without any, that is not recovered yet."""
    keys = keys_of(*secrets) if secrets else None
    return SegmentStore(
        folder,
        limit_bytes,
        segment_bytes=segment_bytes,
        open_file=open_file,
        keys=None if keys is None else lambda: keys,
    )


def large(content: int) -> SampleChunk:
    """A chunk of three units."""
    return sample_chunk(content=content, frame_bytes=3000)


def filled(folder: Path, *secrets: bytes, chunks: int = 3) -> list[SampleChunk]:
    """A closed store with large chunks."""
    stored = [large(content) for content in range(chunks)]
    store = encrypted(folder, *secrets)
    store.recover()
    for chunk in stored:
        append(store, chunk)
    store.close()
    return stored


def found_in(folder: Path, *secrets: bytes) -> dict[tuple[bytes, str], bytes]:
    store = encrypted(folder, *secrets)
    found = contents(store)
    store.check_integrity()
    store.close()
    return found
