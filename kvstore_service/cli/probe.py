"""`kvstore probe`."""

from typing import Annotated

import typer

from kvstore_codec.errors import ServiceError


def probe(
    address: Annotated[str, typer.Argument(help="host:port of a coordinator or storage node.")],
    service: Annotated[
        str, typer.Option(help="Name in gRPC's health service, such as background; '' is the whole server.")
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Ask a server for its health, as probes of Kubernetes do, which cannot use TLS. Needs no token. Exits with status
    1 unless it serves."""
    import grpc
    from grpc_health.v1 import health_pb2

    from kvstore_client.grpc_failure import predicate_of
    from kvstore_service.cluster_stats import environment_connector, serving_status
    from kvstore_service.listen import Address

    where = str(Address.parse(address))
    with environment_connector().channel(where) as channel:
        try:
            status = serving_status(channel, service, timeout)
        except grpc.RpcError as error:
            raise ServiceError(f"the server at {where} {predicate_of(error)}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise ServiceError(f"the server at {where} answers {name}")
    typer.echo(name)
