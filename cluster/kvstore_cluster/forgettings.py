"""What storage nodes have applied of the list of forgotten tenants, and how often tenants are forgotten."""

import time
from collections import Counter
from collections.abc import Iterable

from kvstore_codec.errors import TooManyForgettingsError

MAX_FORGETTINGS, FORGETTINGS_PERIOD_S = 10, 60.0
"""Limit of the forgettings of a tenant in a period. Every node looks at all of its chunks each time."""


class AppliedForgettings:
    """The newest forgetting of a tenant that each node has applied, as the node last said. Not thread-safe: the
    coordinator's lock guards it."""

    def __init__(self) -> None:
        self._applied: dict[str, int] = {}
        # Incarnation of each node, and the newest forgetting when it first asked to join.
        self._joining: dict[str, tuple[int, int]] = {}

    @property
    def newest(self) -> int:
        """The newest forgetting that any node has applied."""
        return max(self._applied.values(), default=0)

    def note(self, node_id: str, applied: int) -> None:
        """A node says what it has applied."""
        self._applied[node_id] = applied

    def may_join(self, node_id: str, incarnation: int, newest: int) -> bool:
        """Whether a node may become a member: when it has applied all tenants that were forgotten when it first asked.
        Those that are forgotten while it applies them do not keep it away, as they do not make a member leave.
        `newest` is the newest forgetting now."""
        began, wanted = self._joining.get(node_id, (None, 0))
        if began != incarnation:
            wanted = newest
            self._joining[node_id] = incarnation, wanted
        return self._applied.get(node_id, 0) >= wanted

    def died(self, node_id: str) -> None:
        """A node is no longer a member, and has to ask again."""
        self._joining.pop(node_id, None)

    def left(self, node_id: str) -> None:
        """A node has left the cluster."""
        self._applied.pop(node_id, None)
        self._joining.pop(node_id, None)

    def missing(self, node_ids: Iterable[str], generation: int) -> list[str]:
        """Those of the nodes, and of those that have asked to join, that have not applied all forgettings up to
        `generation`."""
        known = dict.fromkeys([*node_ids, *self._joining])
        return [node_id for node_id in known if self._applied.get(node_id, 0) < generation]


class ForgettingRate:
    """Limits how often each tenant is forgotten. Not thread-safe."""

    def __init__(self) -> None:
        self._period = 0.0
        self._counts: Counter[str] = Counter()

    def count(self, tenant: str) -> None:
        """A tenant is to be forgotten. Raises TooManyForgettingsError."""
        period = time.monotonic() // FORGETTINGS_PERIOD_S
        if period != self._period:
            self._period, self._counts = period, Counter()
        if self._counts[tenant] == MAX_FORGETTINGS:
            raise TooManyForgettingsError(
                f"the tenant was to be forgotten {MAX_FORGETTINGS} times within {FORGETTINGS_PERIOD_S:g} s; "
                "try again later"
            )
        self._counts[tenant] += 1
