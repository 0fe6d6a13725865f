"""Every chunk as it was stored first: what there is without a controller, and what it is measured against."""

from kvstore_client.planning.base import COMPUTE, Plan, Work
from kvstore_client.planning.predict import predict


class FixedPlanner:
    """The first option of each chunk; computes only what cannot be fetched."""

    def plan(self, work: Work) -> Plan:
        choices = {chunk.index: 0 if chunk.options else COMPUTE for chunk in work.chunks}
        return predict(work, choices, "layers")
