"""Placement of chunks on storage nodes by weighted rendezvous hashing over the membership.

Every client and node computes the owners from the same membership and gets the same result, so there is no directory.
When a member joins or leaves, only the chunks that it gains or owned move (Thaler and Ravishankar 1998; the
logarithmic weighting is from Schindelhauer and Schomaker 2005). Loads differ only by chance, so virtual nodes are
not needed for any weights: with 180,000 chunks on 100 nodes, the fullest node has 1.06 times its share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 16
"""Number of costs computed at once, half a MiB, so that they stay in the processor's cache."""
_FURTHER_READERS = 2
"""Number of members after the owners in rank that are also asked, because owners may just have joined and be empty.
With 3 nodes and no replicas, two nodes that join at once hide 10 % of the chunks with one further reader and none with
two; three that join hide 20 % and 5 %. A lookup of a chunk that is not stored asks every further reader."""


@dataclass(frozen=True, slots=True)
class Member:
    """One live storage node. Raises ValueError for a weight that is not a positive, finite number."""

    node_id: str
    endpoint: str
    """host:port of its Storage service."""
    weight: float = 1.0
    """Relative capacity."""
    bulk_endpoint: str = ""
    """host:port of its bulk port; empty: it has none."""
    domain: str = ""
    """Failure domain: members with the same domain, such as a machine, fail together. Empty: only itself."""
    draining: bool = False
    """It owns no chunks but still serves reads of the chunks that it has."""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight of node {self.node_id!r} must be positive and finite, not {self.weight}"
            )


@dataclass(frozen=True, slots=True)
class Membership:
    """The live members at `epoch`, which grows with every change. Each chunk has `replicas` owners."""

    epoch: int
    members: tuple[Member, ...]
    replicas: int = 1


def owners(content_id: bytes, members: Sequence[Member], replicas: int = 1) -> list[Member]:
    """The owners of one chunk; see `Placement.owners`."""
    return list(Placement(members, replicas).owners([content_id])[0])


class Placement:
    """Placement of chunks in one membership. Immutable and thread-safe. Create it once per membership.

    It depends on the members' ids, weights, domains and draining marks, not on their order or endpoints.
    """

    def __init__(self, members: Sequence[Member], replicas: int = 1) -> None:
        self._members = sorted(members, key=lambda member: member.node_id)
        self._replicas = replicas
        digests = (blake3(member.node_id.encode()).digest(length=8) for member in self._members)
        self._seeds = np.frombuffer(b"".join(digests), "<u8")
        weights = np.array([member.weight for member in self._members])
        # With equal weights, members are ranked by the hash itself, without logarithms.
        self._weights = weights if len(set(weights.tolist())) > 1 else None
        self._draining = np.array([member.draining for member in self._members], bool)
        labels = [member.domain or (member.node_id,) for member in self._members]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self._domains = np.array([numbers[label] for label in labels], np.intp)
        self._share_domains = len(numbers) < len(labels)

    def owners(self, content_ids: Sequence[bytes]) -> list[tuple[Member, ...]]:
        """The `replicas` owners of each content, highest rank first, in different domains if there are enough. Fewer
        owners if there are fewer members. A draining member is never an owner."""
        return self._named(content_ids, self._pick_owners)

    def readers(self, content_ids: Sequence[bytes]) -> list[tuple[Member, ...]]:
        """The members to ask for each content, in this order: its owners, draining members that would own it, and
        members that owned it before one of its owners joined or returned. If several joined at once, the result
        includes a former owner unless the first `replicas + 2` members in rank all joined."""
        return self._named(content_ids, self._pick_readers)

    def _named(
        self,
        content_ids: Sequence[bytes],
        pick: Callable[[NDArray[np.float64]], NDArray[np.intp]],
    ) -> list[tuple[Member, ...]]:
        if not self._members:
            return [()] * len(content_ids)
        named: list[tuple[Member, ...]] = []
        known: dict[tuple[int, ...], tuple[Member, ...]] = {}
        for costs in self._costs(content_ids):
            columns = pick(costs)
            if not columns.shape[1]:
                named += [()] * len(costs)
                continue
            for picked in zip(*columns.T.tolist(), strict=True):
                members = known.get(picked)
                if members is None:
                    members = known[picked] = tuple(self._members[i] for i in dict.fromkeys(picked))
                named.append(members)
        return named

    def _costs(self, content_ids: Sequence[bytes]) -> Iterator[NDArray[np.float64]]:
        """Costs in blocks of `[contents, members]`. The member with the lowest cost owns the content."""
        words = np.frombuffer(b"".join([content_id[:8] for content_id in content_ids]), "<u8")
        rows = max(1, _BLOCK_VALUES // len(self._members))
        for begin in range(0, len(words), rows):
            mixed = _mix(words[begin : begin + rows, None] ^ self._seeds)
            # 52 bits plus one half: the largest double is below 1, so the logarithm is never zero.
            uniform = ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) / (1 << 52)
            yield -uniform if self._weights is None else np.log(uniform) / -self._weights

    def _pick_owners(self, costs: NDArray[np.float64]) -> NDArray[np.intp]:
        return self._pick(costs, ~self._draining)

    def _pick_readers(self, costs: NDArray[np.float64]) -> NDArray[np.intp]:
        live = ~self._draining
        picked = self._pick(costs, live)
        found = [picked]
        if self._draining.any():
            found.append(self._pick(costs, np.ones_like(live)))
        # The owners if one of them were absent.
        for place in range(picked.shape[1] if self._share_domains else 0):
            if live.sum() > self._replicas:
                others = np.tile(live, (len(costs), 1))
                others[np.arange(len(costs)), picked[:, place]] = False
                found.append(self._pick(costs, others))
        found.append(self._first_in_rank(costs, live))
        return np.concatenate(found, axis=1)

    def _first_in_rank(self, costs: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The owners without regard to domains, and the next members in rank, `[contents, members]`."""
        left = np.where(usable, costs, np.inf)
        count = min(self._replicas + _FURTHER_READERS, int(usable.sum()))
        ranked = np.empty((len(costs), count), np.intp)
        for place in range(count):
            ranked[:, place] = left.argmin(axis=1)
            left[np.arange(len(costs)), ranked[:, place]] = np.inf
        return ranked

    def _pick(self, costs: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The owners among the `usable` members for these costs, `[contents, replicas]`."""
        left = np.where(usable, costs, np.inf)
        count = min(self._replicas, int(np.atleast_2d(usable).sum(axis=1)[0]))
        picked = np.empty((len(costs), count), np.intp)
        rows = np.arange(len(costs))
        elsewhere = left.copy() if self._share_domains else left  # costs in domains without an owner yet
        for place in range(count):
            best = elsewhere.argmin(axis=1)
            if self._share_domains:
                best = np.where(np.isinf(elsewhere[rows, best]), left.argmin(axis=1), best)
                elsewhere[self._domains == self._domains[best][:, None]] = np.inf
            left[rows, best] = np.inf
            picked[:, place] = best
        return picked


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each output bit depends on every input bit. Overwrites
    `words`."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
