"""Which storage nodes own a chunk: weighted rendezvous hashing over the membership.

Every client computes this by itself from the same membership and gets the same answer, so no directory is
asked. When a member comes or goes, only the chunks it wins or owned move (Thaler and Ravishankar 1998; the
logarithmic weighting is that of Schindelhauer and Schomaker 2005).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3


@dataclass(frozen=True, slots=True)
class Member:
    """One live storage node. `endpoint` is the host:port of its Storage service, `weight` its relative
    capacity. Raises ValueError for a weight that is not a positive, finite number."""

    node_id: str
    endpoint: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"weight of node {self.node_id!r} must be positive and finite, not {self.weight}"
            )


@dataclass(frozen=True, slots=True)
class Membership:
    """The live members as of `epoch`; the epoch grows with every change."""

    epoch: int
    members: tuple[Member, ...]


def owners(content_id: bytes, members: Sequence[Member], replicas: int = 1) -> list[Member]:
    """The `replicas` members that hold `content_id`, best first; fewer when there are fewer members.

    Depends on ids and weights only: neither the order of `members` nor their endpoints matter.
    """
    ranked = sorted(members, key=lambda member: (-_score(content_id, member), member.node_id))
    return ranked[:replicas]


def _score(content_id: bytes, member: Member) -> float:
    digest = blake3(content_id + member.node_id.encode()).digest(length=8)
    # 52 bits and a half: the largest value is still below 1 as a double, so the logarithm is never zero.
    uniform = ((int.from_bytes(digest, "little") >> 12) + 0.5) / (1 << 52)
    return -member.weight / math.log(uniform)
