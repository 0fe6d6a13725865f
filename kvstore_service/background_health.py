"""Background loops of a process, as gRPC's health service tells of them."""

import grpc
from grpc_health.v1 import health, health_pb2

from kvstore_cluster.background import background_health

BACKGROUND = "background"
"""A name to ask the health service for, beside those of the services: SERVING while no background loop fails. It says
nothing about requests, so it is no reason to take a process out of service."""


class HealthWithBackground(health.HealthServicer):  # type: ignore[misc]  # grpc is not typed
    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service != BACKGROUND:
            return super().Check(request, context)
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if background_health().failing else status.SERVING)
