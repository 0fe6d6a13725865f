"""`kvstore serve`."""

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer


def serve(
    nodes: Annotated[
        int | None, typer.Option(help="Storage nodes on this machine.", show_default="1")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="DRAM of each storage node, such as 4GiB.", show_default="1GiB")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port; port 0 takes any free one.", show_default="127.0.0.1:7420"),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the catalogue.", show_default="a temporary one")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port for Prometheus.", show_default="none")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A .yaml or .toml file with these settings.")] = None,
) -> None:
    """Run a cluster in the foreground: one line when it is ready, a clean stop on SIGTERM or Ctrl-C."""
    from kvstore_service.cluster_stats import cluster_stats
    from kvstore_service.embedded import EmbeddedCluster
    from kvstore_service.listen import Address
    from kvstore_service.metrics import ClusterCollector, metrics_endpoint
    from kvstore_service.settings import load_settings

    settings = load_settings(
        config, nodes=nodes, memory=memory, listen=listen, data_dir=data_dir, metrics_port=metrics_port
    )
    cluster = EmbeddedCluster(
        nodes=settings.nodes,
        memory_bytes=settings.memory,
        listen=settings.listen,
        data_dir=settings.data_dir,
    )
    # Until the cluster is up, a signal unwinds what has been started.
    _on_signals(lambda: sys.exit(0))
    with ExitStack() as running:
        if settings.metrics_port is not None:
            where = Address(Address.parse(settings.listen).host, settings.metrics_port)
            registry = running.enter_context(metrics_endpoint(where))
        running.enter_context(cluster)
        stopping = threading.Event()
        _on_signals(stopping.set)
        if settings.metrics_port is not None:
            registry.register(ClusterCollector(lambda: cluster_stats(cluster.address)))
        typer.echo(
            f"kvstore is ready at {cluster.address}: {settings.nodes} x {settings.memory.human_readable()}"
        )
        stopping.wait()


def _on_signals(action: Callable[[], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: action())
