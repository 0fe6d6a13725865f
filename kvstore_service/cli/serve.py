"""`kvstore serve`."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvstore_codec.errors import StartupError

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_CHECK_PERIOD_S = 2.0


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
    """Run a cluster in the foreground: one line when it is ready, a clean stop on SIGTERM or Ctrl-C.

    Ends with exit status 1 when the cluster is lost."""
    _hold_signals()

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
    with ExitStack() as running:
        if settings.metrics_port is not None:
            where = Address(Address.parse(settings.listen).host, settings.metrics_port)
            registry = running.enter_context(metrics_endpoint(where))
        if signal.sigpending() & _STOP_SIGNALS:
            return
        try:
            running.enter_context(cluster)
        except StartupError:
            # Ctrl-C in a terminal reaches every process of the cluster, and then it is no news what is missing.
            if signal.sigpending() & _STOP_SIGNALS:
                return
            raise
        if signal.sigpending() & _STOP_SIGNALS:
            return
        if settings.metrics_port is not None:
            registry.register(ClusterCollector(lambda: cluster_stats(cluster.address)))
        typer.echo(
            f"kvstore is ready at {cluster.address}: {settings.nodes} x {settings.memory.human_readable()}"
        )
        while signal.sigtimedwait(_STOP_SIGNALS, _CHECK_PERIOD_S) is None:
            cluster.check()


def _hold_signals() -> None:
    """Keeps the signals that stop the service pending, in every thread that comes later, until they are asked for.

    A handler would not do: Ray puts its own in place, which end the process wherever it stands.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    # Ray's processes would inherit it, but SIGTERM is how Ray ends them.
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]))
