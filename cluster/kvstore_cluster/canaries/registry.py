"""The canaries on the coordinator's disk.

Each is one file, `<model digest>-<generation>.kvcanary` (`document.py` says what is in it).
"""

import itertools
import logging
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore_api.printable import printable
from kvstore_cluster.canaries.base import CanaryMirror, CanaryRecord, Origin
from kvstore_cluster.canaries.document import MAX_DOCUMENT_BYTES, bounded, read_document, write_document
from kvstore_cluster.canaries.room import making_room
from kvstore_cluster.durable import rename_durably
from kvstore_codec.canary import read_sketch_header
from kvstore_codec.errors import CanaryError, CatalogueError, UnknownModelError

log = logging.getLogger(__name__)

MAX_MODELS = 4096
MAX_TOTAL_BYTES = 1 << 30

_NAME = re.compile(r"([0-9a-f]{64})-(\d{1,10})\.kvcanary")
_UNFINISHED = ".unfinished-"
_FORGOTTEN = b"\xff" * 32
"""In place of a digest: a record without KV whose generation no forgotten model had a canary of."""


@dataclass(slots=True)
class _Kept:
    record: CanaryRecord
    used: int
    """Grows with every use of any canary."""


class CanaryRegistry:
    """Thread-safe. Keeps its files in `folder`, which is made when missing and belongs to one process at a time: the
    one that holds the catalogue beside it. With a `mirror` every canary is there too, and at the start either side gets
    what only the other one has; of two the one of the later generation counts.

    At most `max_models` and `max_bytes` are kept: then models are forgotten, as `making_room` says. A model that is not
    known begins at a generation that no forgotten one had a canary of, so what was stored under a forgotten canary is
    never named again, and nothing but one number need be remembered of all of them.

    Raises CatalogueError when folder or mirror cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        mirror: CanaryMirror | None = None,
        *,
        max_models: int = MAX_MODELS,
        max_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._folder, self._mirror = folder, mirror
        self._max_models, self._max_bytes = max_models, max_bytes
        self._lock = threading.Lock()  # guards the index
        self._writing = threading.Lock()  # one change at a time; taken before the other one
        self._clock = itertools.count()
        self._kept: dict[bytes, _Kept] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(f"{_UNFINISHED}*"):
                left_over.unlink()
            for path in sorted(folder.glob("*.kvcanary"), key=lambda path: path.stat().st_mtime):
                if match := _NAME.fullmatch(path.name):
                    self._open(path, bytes.fromhex(match[1]), int(match[2]))
        except OSError as error:
            raise self._unusable(error) from error
        if mirror is not None:
            self._synchronise(mirror)
        self._changes = sum(kept.record.generation for kept in self._kept.values())

    @property
    def changes(self) -> int:
        """Grows with every replacement; at the start it is the sum of all generations. Stays where a model is
        forgotten: its workers go on under the generation that they know, and whoever makes its next canary has another
        one."""
        with self._lock:
            return self._changes

    def get(self, model_digest: bytes) -> tuple[CanaryRecord, bytes]:
        """The canary of a model and its KV; a record without any when there is none. Raises CatalogueError when its
        file cannot be read."""
        with self._lock:
            kept = self._kept.get(model_digest)
            if kept is None:
                return CanaryRecord(model_digest, self._first_generation()), b""
            kept.used = next(self._clock)
            record = kept.record
        path = self._path(model_digest, record.generation)
        try:
            content = path.read_bytes()
            with suppress(OSError):
                os.utime(path)  # the order of use outlives a restart
            return read_document(content, model_digest, record.generation)
        except FileNotFoundError:  # replaced or dropped meanwhile
            return replace(record, size_bytes=0), b""
        except CanaryError as error:
            log.warning(
                "the canary of model %s is damaged (%s); it is made anew", model_digest.hex()[:12], error
            )
            return replace(record, size_bytes=0), b""
        except OSError as error:
            raise self._unusable(error) from error

    def count_use(self, model_digest: bytes) -> None:
        """A worker compared itself with the canary."""
        with self._lock:
            if kept := self._kept.get(model_digest):
                kept.used = next(self._clock)

    def put(
        self, model_digest: bytes, generation: int, origin: Origin, sketch: bytes, client: str = ""
    ) -> tuple[CanaryRecord, bytes]:
        """Makes this the model's canary unless it has one, or was replaced since it had this generation. Returns what
        is kept then, once that would survive a power loss. `client` is whose share of the room it takes.

        Raises CanaryError for KV that is not of a probe of this model, and CatalogueError when disk or mirror do not
        take it."""
        if read_sketch_header(sketch).model_digest != model_digest or model_digest == _FORGOTTEN:
            raise CanaryError(f"the KV is of another model than {model_digest.hex()[:12]}")
        with self._writing:
            record, kept = self.get(model_digest)
            if kept or (model_digest in self._kept and record.generation != generation):
                return record, kept
            new = CanaryRecord(
                model_digest, record.generation, bounded(origin), time.time(), len(sketch), client
            )
            self._make_room(new)
            self._keep(new, sketch)
        log.info("canary of model %s kept, made by %s", model_digest.hex()[:12], printable(origin.host))
        return new, sketch

    def replace(self, model_digest: bytes) -> int:
        """Drop a model's canary for good: its next worker makes it anew, and what was stored under the old one is never
        named again. Where none was made since the last time, nothing changes. Returns the generation of the next one.
        Raises UnknownModelError, CatalogueError."""
        with self._writing:
            with self._lock:
                kept = self._kept.get(model_digest)
            if kept is None or model_digest == _FORGOTTEN:
                raise UnknownModelError(f"there is no canary of model {model_digest.hex()[:12]}")
            known = kept.record
            if not known.size_bytes:
                return known.generation
            origin = Origin(known.origin.model_id)
            new = CanaryRecord(model_digest, known.generation + 1, origin, client=known.client)
            self._keep(new, b"")
            with self._lock:
                self._changes += 1
        log.warning("canary of model %s dropped: generation %d", model_digest.hex()[:12], new.generation)
        return new.generation

    def records(self) -> tuple[CanaryRecord, ...]:
        """Everything known, in the order of its last use."""
        with self._lock:
            kept = sorted(self._kept.values(), key=lambda kept: kept.used)
        return tuple(one.record for one in kept if one.record.model_digest != _FORGOTTEN)

    def _first_generation(self) -> int:
        """Of a model that is not known. Called with the lock."""
        forgotten = self._kept.get(_FORGOTTEN)
        return forgotten.record.generation if forgotten is not None else 0

    def _open(self, path: Path, model_digest: bytes, generation: int) -> None:
        record = CanaryRecord(model_digest, generation)
        try:
            if path.stat().st_size <= MAX_DOCUMENT_BYTES:
                record, _ = read_document(path.read_bytes(), model_digest, generation)
        except CanaryError as error:
            log.warning("the canary %s is damaged (%s); it is made anew", path.name, error)
        known = self._kept.get(model_digest)
        if known is not None and known.record.generation > generation:
            path.unlink()
            return
        if known is not None:  # what a crash left beside its successor
            self._path(model_digest, known.record.generation).unlink(missing_ok=True)
        self._kept[model_digest] = _Kept(record, next(self._clock))

    def _synchronise(self, mirror: CanaryMirror) -> None:
        copied: set[bytes] = set()
        for model_digest, generation, content in mirror.copies():
            kept = self._kept.get(model_digest)
            if kept is not None and kept.record.generation > generation:
                continue
            try:
                record, sketch = read_document(content, model_digest, generation)
            except CanaryError as error:
                log.warning("the copy of canary %s is damaged: %s", model_digest.hex()[:12], error)
                continue
            self._write(record, sketch)
            copied.add(model_digest)
        for model_digest in self._kept.keys() - copied:
            record, sketch = self.get(model_digest)
            log.warning(
                "the canary of model %s was not in the mirror and is copied again", model_digest.hex()[:12]
            )
            mirror.keep(model_digest, record.generation, write_document(record, sketch))

    def _make_room(self, new: CanaryRecord) -> None:
        others = (record for record in self.records() if record.model_digest != new.model_digest)
        for record in making_room(others, new, self._max_models, self._max_bytes):
            self._forget(record)

    def _keep(self, record: CanaryRecord, sketch: bytes) -> None:
        """Raises CatalogueError; what was kept then stays."""
        if self._mirror is not None:
            self._mirror.keep(record.model_digest, record.generation, write_document(record, sketch))
        self._write(record, sketch)

    def _write(self, record: CanaryRecord, sketch: bytes) -> None:
        path = self._path(record.model_digest, record.generation)
        unfinished = self._folder / f"{_UNFINISHED}{path.name}"
        try:
            with unfinished.open("wb") as file:
                file.write(write_document(record, sketch))
                file.flush()
                os.fsync(file.fileno())
            rename_durably(unfinished, path)
            with self._lock:
                before = self._kept.get(record.model_digest)
                self._kept[record.model_digest] = _Kept(record, next(self._clock))
            if before is not None and before.record.generation != record.generation:
                self._path(record.model_digest, before.record.generation).unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _forget(self, record: CanaryRecord) -> None:
        with self._lock:
            first = self._first_generation()
        if record.generation >= first:  # before the record goes: a crash in between must not lose it
            self._keep(CanaryRecord(_FORGOTTEN, record.generation + 1), b"")
        if self._mirror is not None:
            self._mirror.forget(record.model_digest)
        with self._lock:
            del self._kept[record.model_digest]
        try:
            self._path(record.model_digest, record.generation).unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _path(self, model_digest: bytes, generation: int) -> Path:
        return self._folder / f"{model_digest.hex()}-{generation}.kvcanary"

    def _unusable(self, error: OSError) -> CatalogueError:
        return CatalogueError(
            f"the canary folder {self._folder} cannot be used ({error.strerror}); "
            "make it writable or choose another --data-dir"
        )
