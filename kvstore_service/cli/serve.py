"""`kvstore serve`."""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvstore_codec.errors import StartupError
from kvstore_service import signals
from kvstore_service.cli.setting_options import setting_options
from kvstore_service.cli.signatures import add_options
from kvstore_service.settings import load_settings

_CHECK_PERIOD_S = 2.0


@add_options(setting_options())
def serve(
    config: Annotated[
        str | None,
        typer.Option(help="A .yaml or .toml file with these settings, a regular one.", metavar="PATH"),
    ] = None,
    **flags: object,
) -> None:
    """Run a cluster in the foreground: one line when it is ready, a clean stop on SIGTERM, SIGHUP or Ctrl-C.

    Each option may also be a KVSTORE_* variable (--durability: KVSTORE_NODE_DURABILITY) or stand in the file; one that
    is empty is not set.

    Ends with exit status 1 when the cluster is lost."""
    settings = load_settings(Path(config).expanduser() if config else None, **flags)
    # No handler: Ray's calls would be broken off wherever they stand.
    stopping = signals.block()

    from kvstore_service.cluster_stats import cluster_stats
    from kvstore_service.embedded import EmbeddedCluster
    from kvstore_service.listen import Address
    from kvstore_service.metrics import ClusterCollector, metrics_endpoint

    cluster = EmbeddedCluster(settings)
    with ExitStack() as running:
        if settings.metrics_port is not None:
            where = Address(Address.parse(settings.listen).host, settings.metrics_port)
            registry = running.enter_context(metrics_endpoint(where))
        if signal.sigpending() & stopping:
            return
        try:
            running.enter_context(cluster)
        except StartupError:
            # Ctrl-C in a terminal reaches every process of the cluster, and then it is no news what is missing.
            if signal.sigpending() & stopping:
                return
            raise
        if signal.sigpending() & stopping:
            return
        if settings.metrics_port is not None:
            registry.register(ClusterCollector(lambda: cluster_stats(cluster.address)))
        typer.echo(
            f"kvstore is ready at {cluster.address}: {cluster.size} x {settings.memory.human_readable()}"
            + (f" and {settings.disk.human_readable()} of disk" if settings.disk else "")
        )
        while signal.sigtimedwait(stopping, _CHECK_PERIOD_S) is None:
            cluster.check()
