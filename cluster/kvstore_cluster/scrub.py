"""Reads all stored chunks and verifies every checksum."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore_cluster.node import StorageNode
from kvstore_cluster.stored import StoredVariant

_PAGE = 256


@dataclass(frozen=True, slots=True)
class Damage:
    variant: StoredVariant
    reason: str


@dataclass(frozen=True, slots=True)
class ScrubProgress:
    """`checked` variants with `bytes_checked` bytes so far, and the variants `damaged` since the last progress."""

    checked: int
    bytes_checked: int
    damaged: tuple[Damage, ...]


def scrub(node: StorageNode, tenant: str | None = None) -> Iterator[ScrubProgress]:
    """Verifies every stored variant, or those of one tenant, in every tier that has it. Yields the progress after each
    page. Drops damaged copies; a chunk without another copy is removed. Skips variants that are evicted meanwhile."""
    cursor = checked = bytes_checked = 0
    while True:
        variants, cursor = node.list(cursor, _PAGE, tenant=tenant)
        damaged = []
        for variant in variants:
            reason = node.verify(variant.chunk_id, variant.encoding, variant.tenant)
            checked += 1
            bytes_checked += variant.size_bytes
            if reason is not None:
                damaged.append(Damage(variant, reason))
        yield ScrubProgress(checked, bytes_checked, tuple(damaged))
        if not cursor:
            return
