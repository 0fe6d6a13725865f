"""The file in the folder of a store that says which records belong to forgotten tenants, so that no restart recovers
them.

Tombstones do not suffice for that: an evicted chunk is dead without one, and a restart may recover its record. The file
names for each forgotten tenant a sequence number, up to which all of its records are dead.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from kvstore_cluster.disk.file import disk_error
from kvstore_cluster.durable import write_durably
from kvstore_cluster.encryption import FileCipher, key_name_of
from kvstore_cluster.forgotten import MAX_FORGOTTEN, Forgotten
from kvstore_cluster.json_values import as_text, as_whole
from kvstore_codec import bounded
from kvstore_codec.errors import CodecError

log = logging.getLogger(__name__)

_NAME, _FORMAT, _VERSION = "forgotten.json", "kvstore-forgotten", 1
_MAX_BYTES = 16 << 20
"""Twice the size of a file with the most tenants and the longest names."""
_MOST_VALUES = 5 * MAX_FORGOTTEN


@dataclass(frozen=True, slots=True)
class ForgottenRecords:
    """The forgotten tenants that a node has applied, and which of its records are dead because of that: those of a
    tenant up to the number in `sequences`, and those of all tenants up to `floor`."""

    applied: Forgotten = field(default_factory=Forgotten)
    sequences: Mapping[str, int] = field(default_factory=dict)
    floor: int = 0

    @property
    def newest_sequence(self) -> int:
        """No record with a higher number is dead."""
        return max([self.floor, *self.sequences.values()])

    def hides(self, tenant: str, sequence: int) -> bool:
        """Whether a record is dead."""
        return sequence <= max(self.sequences.get(tenant, 0), self.floor)

    def __bool__(self) -> bool:
        """Whether any record may be dead."""
        return bool(self.sequences) or self.floor > 0

    def with_applied(
        self, order: Forgotten, tenants: Iterable[str] | None, sequence: int
    ) -> "ForgottenRecords":
        """These and the records up to `sequence` of the `tenants` that `order` names; None stands for all tenants."""
        applied = self.applied.merged(order)
        if tenants is None:
            return ForgottenRecords(applied, {}, sequence)
        sequences = {**self.sequences, **dict.fromkeys(tenants, sequence)}
        dropped = [number for name, number in sequences.items() if name not in applied.tenants]
        kept = {name: number for name, number in sequences.items() if name in applied.tenants}
        return ForgottenRecords(applied, kept, max([self.floor, *dropped]))


def read_forgotten(folder: Path, cipher: FileCipher) -> tuple[ForgottenRecords, str | None]:
    """Reads the file. Returns its content, and the id of the key that encrypts it, None without a file. Without a sound
    file, no forgotten tenant counts as applied: the node applies all of them again. May block. Raises
    EncryptionKeyError when it is encrypted with an unknown key."""
    path = folder / _NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
        document = bounded.loads(cipher.decrypt(path, data).decode(), _MOST_VALUES)
        content = document["content"]
        known = (document["format"], document["version"], document["checksum"])
        if known != (_FORMAT, _VERSION, _checksum(content)):
            log.warning(
                "%s is damaged or of another version; all forgotten tenants are forgotten again", path
            )
            return ForgottenRecords(), None
        tenants = {
            as_text(name): (_sequence(generation), _sequence(last))
            for name, generation, last in content["tenants"]
        }
        records = ForgottenRecords(
            Forgotten({name: pair[0] for name, pair in tenants.items()}, _sequence(content["floor"])),
            {name: pair[1] for name, pair in tenants.items()},
            _sequence(content["floor_sequence"]),
        )
    except FileNotFoundError:
        return ForgottenRecords(), None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CodecError) as error:
        log.warning(
            "%s cannot be read (%s); all forgotten tenants are forgotten again", path, repr(error)[:200]
        )
        return ForgottenRecords(), None
    return records, key_name_of(data)


def write_forgotten(folder: Path, records: ForgottenRecords, cipher: FileCipher) -> None:
    """Writes the file durably. May block. Raises DiskError, and then leaves the old file."""
    applied = records.applied
    content = {
        "tenants": [[name, last, records.sequences.get(name, 0)] for name, last in applied.tenants.items()],
        "floor": applied.floor,
        "floor_sequence": records.floor,
    }
    document = {"format": _FORMAT, "version": _VERSION, "content": content, "checksum": _checksum(content)}
    path = folder / _NAME
    try:
        write_durably(path, cipher.encrypt(path, json.dumps(document).encode()), path.with_suffix(".tmp"))
    except OSError as error:
        raise disk_error(error, f"writing {path}") from error


def _sequence(value: object) -> int:
    """A generation or a sequence number, which are 0 to 2^63 - 1. Raises TypeError."""
    return as_whole(value, bits=63)


def _checksum(content: object) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
