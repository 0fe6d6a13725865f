"""Fixed planner: every chunk in its first encoding. The baseline for the other planners."""

from kvstore_client.planning.base import COMPUTE, Order, Plan, Work
from kvstore_client.planning.predict import predict


class FixedPlanner:
    """Reads the first option of each chunk; computes only chunks that cannot be fetched."""

    def __init__(self, order: Order = "layers") -> None:
        self._order: Order = order

    def plan(self, work: Work) -> Plan:
        choices = {chunk.index: 0 if chunk.options else COMPUTE for chunk in work.chunks}
        return predict(work, choices, self._order)
