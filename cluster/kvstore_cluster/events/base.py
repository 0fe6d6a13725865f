"""What a storage node reports to the coordinator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

IN_MEMORY, ON_DISK = 1, 2
"""Tiers of a block on one node. A sum of both means both, and 0 that the node does not have it."""

BlockStates = Mapping[str, Mapping[bytes, int]]
"""Tiers of blocks on one node, by tenant and prefix id."""


class Taken(NamedTuple):
    """State of some blocks of a node; `from_scratch` and `complete` as in NodeReport. `more`: there are others."""

    states: BlockStates
    from_scratch: bool
    complete: bool
    more: bool


@dataclass(frozen=True, slots=True)
class NodeReport:
    """State of some blocks on a node. Reports of one process of a node (`incarnation`) have increasing numbers. A
    report `from_scratch` is the first of a series that names all blocks of the node; the last one is `complete`, as are
    reports that belong to no series."""

    node_id: str
    incarnation: int
    number: int
    states: BlockStates
    from_scratch: bool = False
    complete: bool = True
