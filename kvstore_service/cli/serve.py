"""`kvstore serve`."""

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvstore_codec.errors import StartupError
from kvstore_service import signals
from kvstore_service.cli.setting_options import setting_options
from kvstore_service.cli.signatures import add_options
from kvstore_service.settings import load_settings, port_variable

_CHECK_PERIOD_S = 2.0


@add_options(setting_options())
def serve(
    config: Annotated[
        str | None,
        typer.Option(help="A regular .yaml or .toml file with these settings.", metavar="PATH"),
    ] = None,
    **flags: object,
) -> None:
    """Run a cluster in the foreground. Prints one line when it is ready; SIGTERM, SIGHUP and Ctrl-C stop it cleanly.

    Each option may also be a KVSTORE_* variable (--durability: KVSTORE_NODE_DURABILITY) or stand in the file; one that
    is empty is not set.

    Exits with status 1 if the cluster is lost."""
    settings = load_settings(Path(config).expanduser() if config else None, **flags)
    if wrong_port := port_variable():
        typer.echo(f"kvstore: {wrong_port}", err=True)
    # No handler, because it would interrupt Ray's calls.
    stopping = signals.block()

    from kvstore_client.logs import install
    from kvstore_service.embedded import EmbeddedCluster
    from kvstore_service.listen import Address
    from kvstore_service.metrics import ClusterCollector
    from kvstore_service.metrics_server import metrics_endpoint
    from kvstore_service.observability.status_page import StatusPage

    cluster = EmbeddedCluster(settings)
    with ExitStack() as running:
        running.callback(install(settings.log_format, settings.log_level, "serve"))
        if settings.metrics_port is not None:
            where = Address(Address.parse(settings.listen).host, settings.metrics_port)
            page = StatusPage()
            registry = running.enter_context(metrics_endpoint(where, cluster.security, page))
        if signal.sigpending() & stopping:
            return
        try:
            running.enter_context(cluster)
        except StartupError:
            # Ctrl-C in a terminal also stops the cluster's processes; the errors that this causes are not reported.
            if signal.sigpending() & stopping:
                return
            raise
        if signal.sigpending() & stopping:
            return
        if settings.metrics_port is not None:
            registry.register(ClusterCollector(cluster.stats, tenants=settings.metrics_tenants))
            page.start(cluster.address, cluster.stats, cluster.models)
            running.callback(page.stop)
        follower = cluster.log_follower(sys.stderr)
        follower.start()
        running.callback(follower.stop)
        typer.echo(
            f"kvstore is ready at {cluster.address}: {cluster.size} x {settings.memory.human_readable()}"
            + (f" and {settings.disk.human_readable()} of disk" if settings.disk else "")
        )
        while signal.sigtimedwait(stopping, _CHECK_PERIOD_S) is None:
            cluster.check()
