"""Reports the state of a process's background loops through the gRPC health service."""

import grpc
from grpc_health.v1 import health, health_pb2

from kvstore_cluster.background import background_health

BACKGROUND = "background"
"""Name in the health service for the background loops. It is SERVING while none of them fails. A failing loop does not
stop requests, so it is not a reason to take the process out of service."""


class HealthWithBackground(health.HealthServicer):  # type: ignore[misc]  # grpc is not typed
    """gRPC's health service, with the additional name BACKGROUND."""

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service != BACKGROUND:
            return super().Check(request, context)
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if background_health().failing else status.SERVING)
