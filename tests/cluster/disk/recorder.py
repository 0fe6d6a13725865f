"""What a disk holds for certain, and what it was given since."""

import random
import threading
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from kvstore_cluster.disk.file import SegmentFile

SECTOR_BYTES = 512  # a disk promises to write no more than that at once


class Recorder:
    """Opens files for a store and remembers for each the bytes that were synced and the writes that were not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced = {path.name: bytearray(path.read_bytes()) for path in folder.glob("*.kvs")}
        self.unsynced: dict[str, list[tuple[int, bytes]]] = {}
        self._lock = threading.Lock()

    def open_file(self, path: Path, *, create: bool, direct: bool) -> SegmentFile:
        recorder = self

        class RecordedFile(SegmentFile):
            def write(self, offset: int, views: Sequence[memoryview]) -> None:
                data = b"".join(views)
                super().write(offset, views)
                with recorder._lock:
                    writes = recorder.unsynced.setdefault(path.name, [])
                    writes.append((offset, data + bytes(-len(data) % 4096)))
                recorder.happened()

            def sync(self) -> None:
                with recorder._lock:
                    covered = len(recorder.unsynced.get(path.name, ()))
                super().sync()
                with recorder._lock:
                    for offset, data in recorder.unsynced.get(path.name, [])[:covered]:
                        _write(recorder.synced.setdefault(path.name, bytearray()), offset, data)
                    del recorder.unsynced.get(path.name, [])[:covered]
                recorder.happened()

        return RecordedFile(path, create=create, direct=direct)

    def happened(self) -> None:
        """Called after every write and sync, by whichever thread did it."""

    def after_power_loss(self, folder: Path, generator: random.Random) -> None:
        """Writes to `folder` what is left when power is lost now: of the writes that were not synced, any sectors."""
        share = generator.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        with self._lock:
            files, unsynced = deepcopy(self.synced), deepcopy(self.unsynced)
        for name, writes in unsynced.items():
            for offset, data in writes:
                for start in range(0, len(data), SECTOR_BYTES):
                    if generator.random() < share:
                        sector = data[start : start + SECTOR_BYTES]
                        _write(files.setdefault(name, bytearray()), offset + start, sector)
        for path in self.folder.glob("*.kvs"):
            (folder / path.name).write_bytes(files.get(path.name, b""))


def _write(file: bytearray, offset: int, data: bytes) -> None:
    file.extend(bytes(max(0, offset + len(data) - len(file))))
    file[offset : offset + len(data)] = data
