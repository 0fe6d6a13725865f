"""Labelled counts of a storage node: bytes by tier and encoding, evictions by cause, refused puts by reason, and what
each tenant asks for. Their labels have few values, so that monitoring may keep a time series for each."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ArenaFullError,
    ChunkTooLargeError,
    ForgottenTenantError,
    NodeDrainingError,
    NotDurableError,
    OverQuotaError,
    TextTooLongError,
)

MOST_TENANTS = 64
"""Limit of the tenants that a node reports one by one. With five numbers each they take about 20 kB in each answer."""
OTHER_TENANTS = "*"
"""Stands for all tenants above that limit. No tenant may have this name."""
NEARLY_FULL = 0.9
"""Used share of a quota above which `quotas_nearly_full` counts it."""


class Tier(StrEnum):
    MEMORY = "memory"
    DISK = "disk"


class EvictionCause(StrEnum):
    """What the room was needed for."""

    MEMORY_FULL = "memory_full"
    DISK_FULL = "disk_full"
    QUOTA = "quota"


class Refusal(StrEnum):
    """Why a put was refused."""

    FULL = "full"
    QUOTA = "quota"
    TEXT_CUT = "text_cut"
    DRAINING = "draining"
    TOO_LARGE = "too_large"
    NOT_DURABLE = "not_durable"
    FORGOTTEN = "forgotten"
    INVALID = "invalid"

    @classmethod
    def of(cls, error: BaseException) -> "Refusal":
        return next((reason for kind, reason in _REFUSALS.items() if isinstance(error, kind)), cls.INVALID)


_REFUSALS: Mapping[type[Exception], Refusal] = {  # a subclass stands before its base
    TextTooLongError: Refusal.TEXT_CUT,
    ArenaFullError: Refusal.FULL,
    OverQuotaError: Refusal.QUOTA,
    NodeDrainingError: Refusal.DRAINING,
    ChunkTooLargeError: Refusal.TOO_LARGE,
    NotDurableError: Refusal.NOT_DURABLE,
    ForgottenTenantError: Refusal.FORGOTTEN,
}


class Sample(NamedTuple):
    """One number. The meaning of `labels` depends on `name`; `kvstore_service.observability` lists both."""

    name: str
    labels: tuple[str, ...]
    value: int


class Tallies:
    """Not thread-safe: used with the storage node's lock held. Encodings are counted by their `family`."""

    def __init__(self) -> None:
        self._stored: Counter[tuple[Tier, str]] = Counter()
        self._written: Counter[str] = Counter()
        self._served: Counter[tuple[Tier, str]] = Counter()
        self._evicted = Counter(dict.fromkeys(EvictionCause, 0))
        self._refused = Counter(dict.fromkeys(Refusal, 0))
        self._known: set[str] = set()
        self._requested: Counter[str] = Counter()
        self._hits: Counter[str] = Counter()
        self._hit_tokens: Counter[str] = Counter()

    def entered(self, tier: Tier, encoding: str, size_bytes: int) -> None:
        """Counts a chunk that is stored in a tier. A negative size counts one that has left it."""
        self._stored[tier, family(encoding)] += size_bytes

    def written(self, encoding: str, size_bytes: int) -> None:
        """Counts a chunk that a put has stored."""
        self._written[family(encoding)] += size_bytes

    def served(self, tier: Tier, encoding: str, size_bytes: int) -> None:
        """Counts bytes sent to readers."""
        self._served[tier, family(encoding)] += size_bytes

    def evicted(self, cause: EvictionCause, chunks: int = 1) -> None:
        self._evicted[cause] += chunks

    def refused(self, error: BaseException) -> None:
        self._refused[Refusal.of(error)] += 1

    def asked(self, tenant: str, *, chunks: int = 0, hits: int = 0, hit_tokens: int = 0) -> None:
        """Counts what lookups of a tenant asked for and found."""
        if tenant not in self._known:
            if len(self._known) < MOST_TENANTS:
                self._known.add(tenant)
            else:
                tenant = OTHER_TENANTS
        self._requested[tenant] += chunks
        self._hits[tenant] += hits
        self._hit_tokens[tenant] += hit_tokens

    def forget(self, concerns: Callable[[str], bool]) -> None:
        """Drops what these tenants have asked for."""
        for tenant in [tenant for tenant in self._known if concerns(tenant)]:
            self._known.remove(tenant)
            for counts in (self._requested, self._hits, self._hit_tokens):
                counts.pop(tenant, None)

    @property
    def stored_bytes(self) -> dict[tuple[Tier, str], int]:
        """Bytes in each tier, by tier and family of encodings."""
        return {key: size for key, size in self._stored.items() if size}

    def samples(self, used_bytes: Mapping[str, int], limits_bytes: Mapping[str, int]) -> Iterator[Sample]:
        """All counts. `used_bytes` and `limits_bytes` are the bytes that tenants have and may have here."""
        yield from _labelled("stored_bytes", self._stored.items())
        yield from _labelled("written_bytes", (((name,), size) for name, size in self._written.items()))
        yield from _labelled("served_bytes", self._served.items())
        yield from _labelled("evictions_by_cause", (((cause,), n) for cause, n in self._evicted.items()))
        yield from _labelled("refused_puts", (((reason,), n) for reason, n in self._refused.items()))
        nearly = sum(
            used_bytes.get(tenant, 0) >= NEARLY_FULL * limit for tenant, limit in limits_bytes.items()
        )
        yield Sample("quotas_nearly_full", (), nearly)
        for name, by_tenant in (("tenant_bytes", used_bytes), ("tenant_limit_bytes", limits_bytes)):
            shown = heapq.nlargest(MOST_TENANTS, by_tenant, key=by_tenant.__getitem__)
            yield from _labelled(name, (((tenant,), by_tenant[tenant]) for tenant in shown))
            if len(by_tenant) > len(shown):
                rest = sum(by_tenant.values()) - sum(by_tenant[tenant] for tenant in shown)
                yield Sample(name, (OTHER_TENANTS,), rest)
        for name, counts in (
            ("tenant_requested_chunks", self._requested),
            ("tenant_hits", self._hits),
            ("tenant_hit_tokens", self._hit_tokens),
        ):
            yield from _labelled(name, (((tenant,), n) for tenant, n in counts.items()))


@lru_cache(maxsize=1024)
def family(encoding: str) -> str:
    """The family of the encoding with this name."""
    return Encoding.parse(encoding).family


def _labelled(name: str, counts: Iterable[tuple[tuple[str, ...], int]]) -> Iterator[Sample]:
    return (Sample(name, tuple(map(str, labels)), count) for labels, count in counts)


def by_key_samples(chunks: Mapping[str, int]) -> Iterator[Sample]:
    """The chunks on disk by the id of the key that encrypts them, which is empty for plain ones."""
    for key_name, count in chunks.items():
        yield Sample("disk_chunks_by_key", (key_name or "plain",), count)
