"""One look through all that a node has: who else should have it, who has, and what is to be sent to whom.

For each variant the nodes are ranked: its owners, best first, then the others that readers try (draining nodes, and
those that owned it before somebody joined). The first in rank that has the variant sends it to the owners that lack it,
so no two nodes send the same. It is had in whatever calibration: a copy never replaces one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore_api.placement import Member, Placement
from kvstore_cluster.repair.base import PeerNodes
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.errors import NodeUnavailableError


@dataclass(frozen=True, slots=True)
class Need:
    """A variant that `owners` lack and this node sends."""

    variant: StoredVariant
    owners: tuple[Member, ...]


@dataclass(slots=True)
class Findings:
    """`lacking` counts variants that an owner lacks, `unclear` those of which that could not be asked."""

    needs: list[Need] = field(default_factory=list)
    lacking: int = 0
    unclear: int = 0


class Survey:
    """Asks the other nodes about pages of variants, in one membership. Who did not answer is not asked again."""

    def __init__(self, node_id: str, placement: Placement, peers: PeerNodes) -> None:
        self._node_id = node_id
        self._placement = placement
        self._peers = peers
        self._silent: set[str] = set()

    def page(self, variants: Sequence[StoredVariant]) -> Findings:
        contents = [variant.chunk_id.content_id for variant in variants]
        owned = self._placement.owners(contents)
        ranked = [
            self._before(owners, readers)
            for owners, readers in zip(owned, self._placement.readers(contents), strict=True)
        ]
        asked = [
            tuple(dict.fromkeys((*before, *owners))) for owners, before in zip(owned, ranked, strict=True)
        ]
        having = self._having(variants, asked)
        findings = Findings()
        for index, variant in enumerate(variants):
            others = [member for member in asked[index] if member.node_id != self._node_id]
            if any(member.node_id in self._silent for member in others):
                findings.unclear += 1
                continue
            has = having[index]
            lacking = tuple(
                owner for owner in owned[index] if owner.node_id not in has and owner.node_id != self._node_id
            )
            findings.lacking += bool(lacking)
            if lacking and not any(member.node_id in has for member in ranked[index]):
                findings.needs.append(Need(variant, lacking))
        return findings

    def _before(self, owners: tuple[Member, ...], readers: tuple[Member, ...]) -> tuple[Member, ...]:
        """Who would send rather than this node."""
        order = tuple(dict.fromkeys((*owners, *readers)))
        names = [member.node_id for member in order]
        return order[: names.index(self._node_id)] if self._node_id in names else order

    def _having(
        self, variants: Sequence[StoredVariant], asked: Sequence[tuple[Member, ...]]
    ) -> list[set[str]]:
        """For each variant the ids of the asked nodes that have it."""
        questions: dict[tuple[Member, str], list[int]] = defaultdict(list)
        for index, (variant, members) in enumerate(zip(variants, asked, strict=True)):
            for member in members:
                if member.node_id != self._node_id:
                    questions[member, variant.encoding].append(index)
        having: list[set[str]] = [set() for _ in variants]
        for (member, encoding), indices in questions.items():
            if member.node_id in self._silent:
                continue
            try:
                answers = self._peers.lookup(
                    member, [variants[index].chunk_id for index in indices], encoding
                )
            except NodeUnavailableError:
                self._silent.add(member.node_id)
                continue
            for index, has in zip(indices, answers, strict=True):
                if has:
                    having[index].add(member.node_id)
        return having
