"""The registry of canaries on the coordinator's disk.

Each canary is one file, `<key>-<generation>.kvcanary`, in the format of `document.py`. The key identifies the model and
the tenant (`CanaryRecord.key`).
"""

import itertools
import logging
import os
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvstore_api.printable import printable
from kvstore_cluster.canaries.base import KEY, CanaryMirror, CanaryRecord, Origin, canary_key
from kvstore_cluster.canaries.document import MAX_DOCUMENT_BYTES, bounded, read_document, write_document
from kvstore_cluster.canaries.room import making_room
from kvstore_cluster.durable import write_durably
from kvstore_cluster.encryption import FileCipher, KeySource, key_name_of
from kvstore_cluster.encryption.files import ADDED_BYTES
from kvstore_codec.canary import read_sketch_header
from kvstore_codec.errors import CanaryError, CatalogueError, ChunkFormatError, UnknownModelError

log = logging.getLogger(__name__)

MAX_MODELS = 4096
MAX_TOTAL_BYTES = 1 << 30

_NAME = re.compile(rf"({KEY})-(\d{{1,10}})\.kvcanary")
_UNFINISHED = ".unfinished-"
_FORGOTTEN = b"\xff" * 32
"""Model digest of a special record without KV. Its generation is larger than that of any forgotten canary."""


@dataclass(slots=True)
class _Kept:
    record: CanaryRecord
    used: int
    """Logical time of the last use, which increases with every use of any canary."""


class CanaryRegistry:
    """Stores canaries, one for each model and tenant. Thread-safe; methods may block on disk and mirror. Its files are
    in `folder`, which is created when missing, and which belongs to the process that has locked the catalogue beside
    it.

    With a `mirror`, the mirror has a copy of every canary. At the start, canaries that only one side has are copied to
    the other. If both have one of the same model, the later generation wins.

    The registry holds at most `max_models` models and `max_bytes`. Above that it forgets models, as `making_room`
    chooses. A new model starts at a generation that no forgotten model had, so that chunks stored under a forgotten
    canary are never found again. One number is enough to remember all forgotten generations.

    With `keys`, the files are encrypted with the first of them, older files by `update_key`. Copies in the mirror are
    not encrypted.

    Raises CatalogueError when folder or mirror cannot be used, and EncryptionKeyError when the key of a file is not
    given.
    """

    def __init__(
        self,
        folder: Path,
        mirror: CanaryMirror | None = None,
        *,
        max_models: int = MAX_MODELS,
        max_bytes: int = MAX_TOTAL_BYTES,
        keys: KeySource | None = None,
    ) -> None:
        self._folder, self._mirror = folder, mirror
        self._max_models, self._max_bytes = max_models, max_bytes
        self._cipher = FileCipher(keys)
        self._key_name: str | None = None
        self._lock = threading.Lock()  # guards `_kept` and `_changes`
        self._writing = threading.Lock()  # one change at a time; acquired before `_lock`
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
        self._changes: Counter[str] = Counter()
        for kept in self._kept.values():
            self._changes[kept.record.tenant] += kept.record.generation

    def changes_of(self, tenant: str | None = None) -> int:
        """A number that increases with every replaced canary of a tenant, or of all tenants (None). It starts as the
        sum of all generations. Forgetting a model does not change it: workers continue with the generation that they
        know, and the model's next canary has another one."""
        with self._lock:
            return self._changes.total() if tenant is None else self._changes[tenant]

    def get(self, model_digest: bytes, tenant: str = "") -> tuple[CanaryRecord, bytes]:
        """A tenant's canary of a model and its KV. A record with empty KV when there is none. Raises CatalogueError
        when its file cannot be read."""
        key = canary_key(model_digest, tenant)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return CanaryRecord(model_digest, self._first_generation(), tenant=tenant), b""
            kept.used = next(self._clock)
            record = kept.record
        path = self._path(key, record.generation)
        try:
            content = self._cipher.decrypt(path, path.read_bytes())
            with suppress(OSError):
                os.utime(path)  # the order of use survives a restart
            return read_document(content, key, record.generation)
        except FileNotFoundError:  # replaced or dropped in the meantime
            return replace(record, size_bytes=0), b""
        except (CanaryError, ChunkFormatError) as error:
            log.warning(
                "the canary of model %s is damaged (%s); the next worker computes a new one",
                model_digest.hex()[:12],
                error,
            )
            return replace(record, size_bytes=0), b""
        except OSError as error:
            raise self._unusable(error) from error

    def count_use(self, model_digest: bytes, tenant: str = "") -> None:
        """Records that a worker compared its KV with the canary."""
        with self._lock:
            if kept := self._kept.get(canary_key(model_digest, tenant)):
                kept.used = next(self._clock)

    def put(
        self,
        model_digest: bytes,
        generation: int,
        origin: Origin,
        sketch: bytes,
        client: str = "",
        tenant: str = "",
    ) -> tuple[CanaryRecord, bytes]:
        """Stores a canary of a tenant, unless the model has one or its generation is no longer `generation`. Returns
        the canary that is now stored, which survives a power loss. `client` is charged for its space.

        Raises CanaryError for KV that is not of a probe of this model, and CatalogueError when disk or mirror cannot
        store it."""
        if read_sketch_header(sketch).model_digest != model_digest or model_digest == _FORGOTTEN:
            raise CanaryError(f"the KV is of another model than {model_digest.hex()[:12]}")
        with self._writing:
            record, kept = self.get(model_digest, tenant)
            if kept or (record.key in self._kept and record.generation != generation):
                return record, kept
            new = CanaryRecord(
                model_digest, record.generation, bounded(origin), time.time(), len(sketch), client, tenant
            )
            self._make_room(new)
            self._keep(new, sketch)
        log.info("canary of model %s kept, made by %s", model_digest.hex()[:12], printable(origin.host))
        return new, sketch

    def replace(self, model_digest: bytes, tenant: str = "") -> int:
        """Drops a tenant's canary of a model. The tenant's next worker computes a new one, and chunks stored under the
        old one are never found again. Does nothing when the model has no canary now. Returns the generation of the next
        canary. Raises UnknownModelError, CatalogueError."""
        with self._writing:
            with self._lock:
                kept = self._kept.get(canary_key(model_digest, tenant))
            if kept is None or model_digest == _FORGOTTEN:
                raise UnknownModelError(f"there is no canary of model {model_digest.hex()[:12]}")
            known = kept.record
            if not known.size_bytes:
                return known.generation
            origin = Origin(known.origin.model_id)
            new = CanaryRecord(model_digest, known.generation + 1, origin, client=known.client, tenant=tenant)
            self._keep(new, b"")
            with self._lock:
                self._changes[tenant] += 1
        log.warning("canary of model %s dropped: generation %d", model_digest.hex()[:12], new.generation)
        return new.generation

    def forget_tenant(self, tenant: str) -> None:
        """Removes all canaries of a tenant. Chunks that were stored under them are never found again. Raises
        CatalogueError."""
        with self._writing:
            for record in self.records():
                if record.tenant == tenant:
                    self._forget(record)

    def update_key(self, stopping: threading.Event) -> None:
        """Encrypts the files with the first key, if that is another one than at the last call that succeeded. Ends
        early once `stopping` is set. Raises CatalogueError, also on a full disk, and EncryptionKeyError when the key of
        a file is not given. Another call then continues."""
        key_name = self._cipher.key_name
        if key_name == self._key_name:
            return
        try:
            for path in self._folder.glob("*.kvcanary"):
                if stopping.is_set():
                    return
                with self._writing, suppress(FileNotFoundError):  # replaced or dropped in the meantime
                    self._encrypt_again(path, key_name)
        except OSError as error:
            raise self._unusable(error) from error
        self._key_name = key_name
        log.info("canaries in %s are encrypted with key %s", self._folder, key_name)

    def _encrypt_again(self, path: Path, key_name: str) -> None:
        """Encrypts a file with the first key, unless its key is `key_name`. Call with `_writing` held. Raises OSError,
        EncryptionKeyError."""
        with path.open("rb") as file:
            if key_name_of(file.read(ADDED_BYTES)) == key_name:
                return
            file.seek(0)
            data, before = file.read(), os.fstat(file.fileno())
        try:
            self._write_file(path, self._cipher.decrypt(path, data))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # this is no use of the canary
        except ChunkFormatError as error:  # it stays as it is, for whoever looks into it
            log.warning("move %s away before its encryption key is removed: it is damaged (%s)", path, error)

    def records(self) -> tuple[CanaryRecord, ...]:
        """Records of all models and tenants, least recently used first. A damaged one is missing until its next worker
        computes it anew, unless it is of the default tenant: whose it is was in the damaged bytes."""
        return tuple(record for record in self._replaceable() if len(record.model_digest) == len(_FORGOTTEN))

    def _replaceable(self) -> tuple[CanaryRecord, ...]:
        """Records that may be forgotten, least recently used first."""
        with self._lock:
            kept = sorted(self._kept.values(), key=lambda kept: kept.used)
        return tuple(one.record for one in kept if one.record.model_digest != _FORGOTTEN)

    def _first_generation(self) -> int:
        """First generation of an unknown model. Call with the lock held."""
        forgotten = self._kept.get(_FORGOTTEN)
        return forgotten.record.generation if forgotten is not None else 0

    def _open(self, path: Path, key: bytes, generation: int) -> None:
        record = CanaryRecord(key, generation)
        try:
            if path.stat().st_size <= MAX_DOCUMENT_BYTES + ADDED_BYTES:
                content = self._cipher.decrypt(path, path.read_bytes())
                record, _ = read_document(content, key, generation)
        except (CanaryError, ChunkFormatError) as error:
            log.warning("the canary %s is damaged (%s); the next worker computes a new one", path.name, error)
        known = self._kept.get(key)
        if known is not None and known.record.generation > generation:
            path.unlink()
            return
        if known is not None:  # an older file, which a crash left beside its successor
            self._path(key, known.record.generation).unlink(missing_ok=True)
        self._kept[key] = _Kept(record, next(self._clock))

    def _synchronise(self, mirror: CanaryMirror) -> None:
        copied: set[bytes] = set()
        for key, generation, content in mirror.copies():
            kept = self._kept.get(key)
            if kept is not None and kept.record.generation > generation:
                continue
            try:
                record, sketch = read_document(content, key, generation)
            except CanaryError as error:
                log.warning("the copy of canary %s is damaged: %s", key.hex()[:12], error)
                continue
            self._write(record, sketch)
            copied.add(key)
        for key in self._kept.keys() - copied:
            known = self._kept[key].record
            record, sketch = self.get(known.model_digest, known.tenant)
            log.warning("canary %s was not in the mirror and is copied again", key.hex()[:12])
            mirror.keep(key, record.generation, write_document(record, sketch))

    def _make_room(self, new: CanaryRecord) -> None:
        others = (record for record in self._replaceable() if record.key != new.key)
        for record in making_room(others, new, self._max_models, self._max_bytes):
            self._forget(record)

    def _keep(self, record: CanaryRecord, sketch: bytes) -> None:
        """Stores a canary in mirror and folder. Raises CatalogueError, and then keeps the previous one."""
        if self._mirror is not None:
            self._mirror.keep(record.key, record.generation, write_document(record, sketch))
        self._write(record, sketch)

    def _write(self, record: CanaryRecord, sketch: bytes) -> None:
        path = self._path(record.key, record.generation)
        try:
            self._write_file(path, write_document(record, sketch))
            with self._lock:
                before = self._kept.get(record.key)
                self._kept[record.key] = _Kept(record, next(self._clock))
            if before is not None and before.record.generation != record.generation:
                self._path(record.key, before.record.generation).unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _write_file(self, path: Path, content: bytes) -> None:
        """Raises OSError."""
        write_durably(path, self._cipher.encrypt(path, content), self._folder / f"{_UNFINISHED}{path.name}")

    def _forget(self, record: CanaryRecord) -> None:
        with self._lock:
            first = self._first_generation()
        if record.generation >= first:  # before the record is removed, so that a crash cannot lose the number
            self._keep(CanaryRecord(_FORGOTTEN, record.generation + 1), b"")
        if self._mirror is not None:
            self._mirror.forget(record.key)
        with self._lock:
            del self._kept[record.key]
        try:
            self._path(record.key, record.generation).unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def _path(self, key: bytes, generation: int) -> Path:
        return self._folder / f"{key.hex()}-{generation}.kvcanary"

    def _unusable(self, error: OSError) -> CatalogueError:
        return CatalogueError(
            f"the canary folder {self._folder} cannot be used ({error.strerror}); "
            "make it writable or choose another --data-dir"
        )
