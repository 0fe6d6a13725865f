"""Numbers for what clients name and millions of chunks share: tenants, encodings, calibrations."""

from collections import Counter
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from kvstore_codec.errors import OverQuotaError, StorageError

MOST_NAMES = 1 << 16
"""Of one kind at a time: numbers have two bytes."""
MOST_ENCODINGS = 256
"""That the chunks of one tenant are in at a time."""
MOST_CALIBRATIONS = 1024
"""That the chunks of one tenant need at a time: one for each model and setting."""

Name = TypeVar("Name")


class NameTable(Generic[Name]):
    """A number for each name, for as long as somebody uses it. Not thread-safe."""

    def __init__(self, what: str) -> None:
        """`what` the names are, for errors."""
        self._what = what
        self.names: dict[int, Name] = {}
        """By number, those in use."""
        self._numbers: dict[Name, int] = {}
        self._uses: Counter[int] = Counter()
        self._free: list[int] = []
        self.identity: dict[int, int] = {}
        """From each number in use to itself."""

    def number(self, name: Name) -> int | None:
        """None when nobody uses the name."""
        return self._numbers.get(name)

    def acquire(self, name: Name) -> int:
        """Uses a name once more. Raises StorageError when MOST_NAMES others are in use."""
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
        """Uses it once less. After the last use another name may have the number."""
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._uses[number], self._numbers[self.names.pop(number)], self.identity[number]
            self._free.append(number)


class TenantNames(Generic[Name]):
    """As NameTable, of names that tenants use; each tenant may use `most_per_tenant` different ones at a time, so that
    none can take all of them."""

    def __init__(self, what: str, most_per_tenant: int) -> None:
        self._what = what
        self._most_per_tenant = most_per_tenant
        self._uses: Counter[tuple[int, int]] = Counter()  # by tenant and number
        self._different: Counter[int] = Counter()  # by tenant
        self.table = NameTable[Name](what)

    def acquire(self, name: Name, tenant: int) -> int:
        """Raises OverQuotaError, and StorageError as `NameTable.acquire`."""
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
    """The numbers of what a variant is."""

    encoding: int
    calibration: int
    tenant: int


class ChunkNames:
    """The names that a node's chunks bear. A description is acquired for each chunk and released with it."""

    def __init__(self) -> None:
        self._encodings = TenantNames[str]("encodings", MOST_ENCODINGS)
        self._calibrations = TenantNames[bytes | None]("calibrations", MOST_CALIBRATIONS)
        self._tenants = NameTable[str]("tenants")
        # By number, those that chunks bear.
        self.encodings: Mapping[int, str] = self._encodings.table.names
        self.calibrations: Mapping[int, bytes | None] = self._calibrations.table.names
        self.tenants: Mapping[int, str] = self._tenants.names
        # A description uses each of its names once, however many chunks it describes: one look-up for a chunk.
        self._described: dict[tuple[str, bytes | None, str], Description] = {}
        self._uses: dict[Description, int] = {}

    def acquire(self, encoding: str, calibration: bytes | None, tenant: str) -> Description:
        """Raises StorageError when there are too many, and OverQuotaError when the tenant has; then nothing was
        acquired."""
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
        """None when no chunk is in this encoding."""
        return self._encodings.table.number(name)

    @property
    def all_encodings(self) -> Mapping[int, int]:
        """Each number of an encoding that a chunk is in, with itself as its rank."""
        return self._encodings.table.identity
