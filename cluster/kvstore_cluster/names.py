"""Small numbers for the names that chunks share: tenants, encodings and calibrations."""

from collections import Counter
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from kvstore_codec.errors import OverQuotaError, StorageError

MOST_NAMES = 1 << 16
"""Limit of the names of one kind in use at a time. Numbers have two bytes."""
MOST_ENCODINGS = 256
"""Limit of the encodings that the chunks of one tenant use at a time."""
MOST_CALIBRATIONS = 1024
"""Limit of the calibrations that the chunks of one tenant use at a time: one for each model and setting."""

MAX_TENANT_BYTES = 255

Name = TypeVar("Name")


class NameTable(Generic[Name]):
    """Assigns a number to each name in use. Counts the uses of each name. Not thread-safe."""

    def __init__(self, what: str) -> None:
        """`what` is the plural noun for the names in error messages."""
        self._what = what
        self.names: dict[int, Name] = {}
        """Names in use, by number."""
        self._numbers: dict[Name, int] = {}
        self._uses: Counter[int] = Counter()
        self._free: list[int] = []
        self.identity: dict[int, int] = {}
        """Maps each number in use to itself."""

    def number(self, name: Name) -> int | None:
        """Number of a name. None when the name is not in use."""
        return self._numbers.get(name)

    def acquire(self, name: Name) -> int:
        """Adds a use of a name and returns its number. Raises StorageError when MOST_NAMES other names are in use."""
        number = self._numbers.get(name)
        if number is None:
            if len(self._numbers) == MOST_NAMES:
                raise StorageError(
                    f"a node keeps chunks of at most {MOST_NAMES} different {self._what} at a time; "
                    "delete those of some, or wait until they are evicted"
                )
            number = self._free.pop() if self._free else len(self.names)
            self.names[number] = name
            self._numbers[name] = self.identity[number] = number
        self._uses[number] += 1
        return number

    def release(self, number: int) -> None:
        """Removes a use of a name. After the last one, another name may get the number."""
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._uses[number], self._numbers[self.names.pop(number)], self.identity[number]
            self._free.append(number)


class TenantNames(Generic[Name]):
    """A NameTable whose names are used by tenants. Each tenant may use `most_per_tenant` different names at a time, so
    that no tenant can exhaust the table. Not thread-safe."""

    def __init__(self, what: str, most_per_tenant: int) -> None:
        self._what = what
        self._most_per_tenant = most_per_tenant
        self._uses: Counter[tuple[int, int]] = (
            Counter()
        )  # uses of a name by a tenant, by (tenant number, number)
        self._different: Counter[int] = Counter()  # names in use, by tenant number
        self.table = NameTable[Name](what)

    def acquire(self, name: Name, tenant: int) -> int:
        """Adds a use of a name by a tenant and returns its number. Raises OverQuotaError when the tenant uses
        `most_per_tenant` other names, and StorageError when MOST_NAMES other names are in use."""
        number = self.table.number(name)
        if number is None or (tenant, number) not in self._uses:
            if self._different[tenant] >= self._most_per_tenant:
                raise OverQuotaError(
                    f"a tenant may have chunks of at most {self._most_per_tenant} different {self._what} on a node at "
                    "a time; delete those of some, or wait until they are evicted"
                )
            number = self.table.acquire(name)
            self._different[tenant] += 1
        self._uses[tenant, number] += 1
        return number

    def release(self, number: int, tenant: int) -> None:
        self._uses[tenant, number] -= 1
        if not self._uses[tenant, number]:
            del self._uses[tenant, number]
            self._different[tenant] -= 1
            if not self._different[tenant]:
                del self._different[tenant]
            self.table.release(number)


class Description(NamedTuple):
    """Numbers of the names that a variant has."""

    encoding: int
    calibration: int
    tenant: int


class ChunkNames:
    """Names of a node's chunks. The index acquires a description for each chunk, and releases it with the chunk. Not
    thread-safe."""

    def __init__(self) -> None:
        self._encodings = TenantNames[str]("encodings", MOST_ENCODINGS)
        self._calibrations = TenantNames[bytes | None]("calibrations", MOST_CALIBRATIONS)
        self._tenants = NameTable[str]("tenants")
        # Names in use, by number.
        self.encodings: Mapping[int, str] = self._encodings.table.names
        self.calibrations: Mapping[int, bytes | None] = self._calibrations.table.names
        self.tenants: Mapping[int, str] = self._tenants.names
        # A description uses each of its names once, independent of its number of chunks: one look-up for each chunk.
        self._described: dict[tuple[str, bytes | None, str], Description] = {}
        self._uses: dict[Description, int] = {}

    def acquire(self, encoding: str, calibration: bytes | None, tenant: str) -> Description:
        """Adds a use of a description. Raises StorageError when the node has too many names, and OverQuotaError when
        the tenant has. In both cases nothing is acquired."""
        names = encoding, calibration, tenant
        described = self._described.get(names)
        if described is None:
            described = self._described[names] = self._acquire_names(encoding, calibration, tenant)
            self._uses[described] = 0
        self._uses[described] += 1
        return described

    def release(self, described: Description) -> None:
        self._uses[described] -= 1
        if not self._uses[described]:
            encoding, calibration, tenant = described
            names = self.encodings[encoding], self.calibrations[calibration], self.tenants[tenant]
            del self._uses[described], self._described[names]
            self._encodings.release(encoding, tenant)
            self._calibrations.release(calibration, tenant)
            self._tenants.release(tenant)

    def _acquire_names(self, encoding: str, calibration: bytes | None, tenant: str) -> Description:
        owner = self._tenants.acquire(tenant)
        try:
            encoding_number = self._encodings.acquire(encoding, owner)
            try:
                return Description(encoding_number, self._calibrations.acquire(calibration, owner), owner)
            except StorageError:
                self._encodings.release(encoding_number, owner)
                raise
        except StorageError:
            self._tenants.release(owner)
            raise

    def encoding_number(self, name: str) -> int | None:
        """Number of an encoding. None when no chunk has this encoding."""
        return self._encodings.table.number(name)

    @property
    def all_encodings(self) -> Mapping[int, int]:
        """Maps the number of each encoding in use to itself, as its rank."""
        return self._encodings.table.identity
