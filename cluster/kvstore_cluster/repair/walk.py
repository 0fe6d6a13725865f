"""Surveys the variants of a node, and finds those that the node must send to owners that lack them.

For each variant the nodes are ranked: its owners, best first, then the other nodes that readers try (draining nodes,
and former owners from before a node joined). The first node in rank that has the variant sends it to the owners that
lack it, so no two nodes send the same copy. A node with any calibration of the variant counts as having it, because a
copy never replaces another one.
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
    """A variant that this node must send to `owners`, which lack it."""

    variant: StoredVariant
    owners: tuple[Member, ...]


@dataclass(slots=True)
class Findings:
    """Result of a survey of one page. `lacking` counts variants that an owner lacks. `unclear` counts variants for
    which a node did not answer. `homeless` counts lacking variants without any owner, because every node is
    draining."""

    needs: list[Need] = field(default_factory=list)
    lacking: int = 0
    unclear: int = 0
    homeless: int = 0


@dataclass(frozen=True, slots=True)
class _Role:
    """The role of this node for contents with these owners. `before` are the nodes ranked before it. `asked` are all
    other nodes that the survey must ask."""

    owners: tuple[Member, ...]
    before: tuple[Member, ...]
    asked: tuple[Member, ...]


class Survey:
    """Asks the other nodes about pages of variants, under one membership. Asks a node that did not answer only once."""

    def __init__(self, node_id: str, placement: Placement, peers: PeerNodes) -> None:
        self._node_id = node_id
        self._placement = placement
        self._peers = peers
        self._silent: set[str] = set()

    def page(self, variants: Sequence[StoredVariant]) -> Findings:
        roles = self._roles([variant.chunk_id.content_id for variant in variants])
        having = self._having(variants, roles)
        findings = Findings()
        for variant, role, has in zip(variants, roles, having, strict=True):
            if not role.owners:
                findings.lacking += 1
                findings.homeless += 1
                continue
            if len(has) == len(role.asked):
                continue  # all asked nodes have it
            if self._silent and not self._silent.isdisjoint(member.node_id for member in role.asked):
                findings.unclear += 1
                continue
            lacking = tuple(
                owner for owner in role.owners if owner.node_id not in has and owner.node_id != self._node_id
            )
            findings.lacking += bool(lacking)
            if lacking and not any(member.node_id in has for member in role.before):
                findings.needs.append(Need(variant, lacking))
        return findings

    def _roles(self, contents: Sequence[bytes]) -> list[_Role]:
        owned, read = self._placement.owners(contents), self._placement.readers(contents)
        # The placement returns the same few tuple objects. Comparing them by identity avoids hashing members for each
        # content, which would dominate the time.
        known: dict[tuple[int, int], _Role] = {}
        roles: list[_Role] = []
        for owners, readers in zip(owned, read, strict=True):
            role = known.get((id(owners), id(readers)))
            if role is None:
                role = known[id(owners), id(readers)] = self._role(owners, readers)
            roles.append(role)
        return roles

    def _role(self, owners: tuple[Member, ...], readers: tuple[Member, ...]) -> _Role:
        order = tuple(dict.fromkeys((*owners, *readers)))
        names = [member.node_id for member in order]
        before = order[: names.index(self._node_id)] if self._node_id in names else order
        asked = tuple(
            member for member in dict.fromkeys((*before, *owners)) if member.node_id != self._node_id
        )
        return _Role(owners, before, asked)

    def _having(self, variants: Sequence[StoredVariant], roles: Sequence[_Role]) -> list[set[str]]:
        """For each variant, the ids of the asked nodes that have it."""
        same: dict[tuple[int, str], list[int]] = defaultdict(list)  # variants of one role and one encoding
        for index, (variant, role) in enumerate(zip(variants, roles, strict=True)):
            same[id(role), variant.encoding].append(index)
        questions: dict[tuple[Member, str], list[int]] = defaultdict(list)
        for (_, encoding), indices in same.items():
            for member in roles[indices[0]].asked:
                questions[member, encoding] += indices
        having: list[set[str]] = [set() for _ in variants]
        for (member, _), indices in questions.items():
            if member.node_id in self._silent:
                continue
            try:
                answers = self._peers.lookup(member, [variants[index] for index in indices])
            except NodeUnavailableError:
                self._silent.add(member.node_id)
                continue
            for index, has in zip(indices, answers, strict=True):
                if has:
                    having[index].add(member.node_id)
        return having
