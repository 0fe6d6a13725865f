"""What prefixes are stored on while they are measured."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

_MEMORY_BYTES, _DISK_BYTES = 2 << 30, 8 << 30


@contextmanager
def cluster_with_disk() -> Iterator[tuple[str, Path]]:
    """The address of a cluster whose disks can be slowed down, and a folder for other files. Both end with the
    context."""
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-reprefill-") as folder,
        EmbeddedCluster(
            settings_of(
                memory=_MEMORY_BYTES, disk=_DISK_BYTES, data_dir=Path(folder, "nodes"), experiments=True
            )
        ) as cluster,
    ):
        yield cluster.address, Path(folder)
