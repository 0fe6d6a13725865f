"""`kvstore predict`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options


def predict(
    bandwidth: Annotated[
        str, typer.Option(help="Bandwidth of the link from the nodes to the worker, such as 1gbit.")
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHUNK...",
            help="The prompt's chunks in order: whole names, content_id+prefix_id in hexadecimal digits.",
        ),
    ] = None,
    file: options.ChunkFile = None,
    latency: Annotated[float, typer.Option(min=0.0, help="Latency of that link, seconds.")] = 0.0,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            help="An encoding that the worker accepts, best first; repeat for more.",
            show_default="exact ones",
        ),
    ] = None,
    tenant: options.Tenant = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Predict how long a fetch of a prompt's stored chunks takes, for routers. Changes nothing."""
    from kvstore_api.chunk_refs import chunk_ref
    from kvstore_api.v1 import kvstore_pb2 as pb
    from kvstore_service.bandwidth import parse_bandwidth
    from kvstore_service.cli.chunk_arguments import chunk_patterns
    from kvstore_service.cluster_stats import predicted
    from kvstore_service.listen import Address

    chunks = [pattern.chunk_id for pattern in chunk_patterns(names, file)]
    refs = [chunk_ref(chunk) for chunk in chunks if chunk is not None]
    if not refs or len(refs) < len(chunks):
        raise ConfigurationError(
            "give whole names of chunks: content_id+prefix_id, of 64 hexadecimal digits each"
        )
    request = pb.PredictRequest(
        chunks=refs,
        encodings=encoding or (),
        bandwidth_bps=max(1, round(parse_bandwidth(bandwidth))),
        latency_us=round(1e6 * latency),
        tenant=tenant or "",
    )
    reply = predicted(str(Address.parse(address)), request)
    parts = [
        {
            "node_id": part.node_id,
            "encoding": part.encoding,
            "tier": "disk" if part.on_disk else "memory",
            "chunks": part.chunks,
            "bytes": part.size_bytes,
        }
        for part in reply.parts
    ]
    if json_output:
        found = {"chunks": reply.chunks, "bytes": reply.size_bytes, "seconds": reply.seconds, "parts": parts}
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"{reply.chunks} of {len(refs)} chunks, {reply.size_bytes} bytes, {reply.seconds:.3f} s")
    for part in parts:
        typer.echo("  {node_id}: {chunks} chunks, {encoding}, {bytes} bytes from {tier}".format(**part))
