"""Which storage nodes own a chunk: weighted rendezvous hashing over the membership.

Every client and node computes this by itself from the same membership and gets the same answer, so no directory is
asked. When a member comes or goes, only the chunks it wins or owned move (Thaler and Ravishankar 1998; the
logarithmic weighting is that of Schindelhauer and Schomaker 2005). Loads differ by chance alone, so no virtual nodes
are needed, however unequal the weights: of 180,000 chunks on 100 nodes the fullest has 1.06 times its share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 16
"""Costs computed at once: half a MiB, which stays in the processor's cache."""
_FURTHER_READERS = 2
"""Who comes after the owners in rank is a reader, too: owners may have joined a moment ago. Of 3 nodes without
replicas, two that joined at once hide 10 % of the chunks with one further reader and none with two; three that joined
hide 20 and 5 %. Each further one is asked for every chunk that is stored nowhere."""


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
    """What fails together with it, such as a machine; empty: only itself."""
    draining: bool = False
    """It owns nothing any more, but still answers for what it has."""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight of node {self.node_id!r} must be positive and finite, not {self.weight}"
            )


@dataclass(frozen=True, slots=True)
class Membership:
    """The live members as of `epoch`, which grows with every change, and how many of them own each chunk."""

    epoch: int
    members: tuple[Member, ...]
    replicas: int = 1


def owners(content_id: bytes, members: Sequence[Member], replicas: int = 1) -> list[Member]:
    """The owners of one chunk; see `Placement.owners`."""
    return list(Placement(members, replicas).owners([content_id])[0])


class Placement:
    """Where chunks belong in one membership. Immutable and thread-safe; made once per membership.

    Depends on ids, weights, domains and who is draining: neither the order of `members` nor their endpoints matter.
    """

    def __init__(self, members: Sequence[Member], replicas: int = 1) -> None:
        self._members = sorted(members, key=lambda member: member.node_id)
        self._replicas = replicas
        digests = (blake3(member.node_id.encode()).digest(length=8) for member in self._members)
        self._seeds = np.frombuffer(b"".join(digests), "<u8")
        weights = np.array([member.weight for member in self._members])
        # One weight for all ranks by the hash itself, without the logarithms.
        self._weights = weights if len(set(weights.tolist())) > 1 else None
        self._draining = np.array([member.draining for member in self._members], bool)
        labels = [member.domain or (member.node_id,) for member in self._members]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self._domains = np.array([numbers[label] for label in labels], np.intp)
        self._share_domains = len(numbers) < len(labels)

    def owners(self, content_ids: Sequence[bytes]) -> list[tuple[Member, ...]]:
        """The `replicas` members that hold each of these contents, best first, of different domains as far as there
        are enough; fewer when there are fewer members. A draining member owns nothing."""
        return self._named(content_ids, self._pick_owners)

    def readers(self, content_ids: Sequence[bytes]) -> list[tuple[Member, ...]]:
        """Where to look for each of these contents, in this order: its owners; draining members that would own it;
        and who owned it before one of its owners joined or came back. When several did so together, it is one of those
        who owned it before, unless `replicas + 2` members that joined are the first in rank."""
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
        """Blocks of `[contents, members]`: the member with the lowest cost owns the content."""
        words = np.frombuffer(b"".join([content_id[:8] for content_id in content_ids]), "<u8")
        rows = max(1, _BLOCK_VALUES // len(self._members))
        for begin in range(0, len(words), rows):
            mixed = _mix(words[begin : begin + rows, None] ^ self._seeds)
            # 52 bits and a half: the largest value is still below 1 as a double, so the logarithm is never zero.
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
        # The owners if one of them were not there.
        for place in range(picked.shape[1] if self._share_domains else 0):
            if live.sum() > self._replicas:
                others = np.tile(live, (len(costs), 1))
                others[np.arange(len(costs)), picked[:, place]] = False
                found.append(self._pick(costs, others))
        found.append(self._first_in_rank(costs, live))
        return np.concatenate(found, axis=1)

    def _first_in_rank(self, costs: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The owners if domains did not count, and those who would come next, `[contents, members]`."""
        left = np.where(usable, costs, np.inf)
        count = min(self._replicas + _FURTHER_READERS, int(usable.sum()))
        ranked = np.empty((len(costs), count), np.intp)
        for place in range(count):
            ranked[:, place] = left.argmin(axis=1)
            left[np.arange(len(costs)), ranked[:, place]] = np.inf
        return ranked

    def _pick(self, costs: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The owners by these costs among the usable members, `[contents, replicas]`."""
        left = np.where(usable, costs, np.inf)
        count = min(self._replicas, int(np.atleast_2d(usable).sum(axis=1)[0]))
        picked = np.empty((len(costs), count), np.intp)
        rows = np.arange(len(costs))
        elsewhere = left.copy() if self._share_domains else left  # in domains without an owner yet
        for place in range(count):
            best = elsewhere.argmin(axis=1)
            if self._share_domains:
                best = np.where(np.isinf(elsewhere[rows, best]), left.argmin(axis=1), best)
                elsewhere[self._domains == self._domains[best][:, None]] = np.inf
            left[rows, best] = np.inf
            picked[:, place] = best
        return picked


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit. Overwrites `words`."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
