"""`kvstore serve`."""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvstore_codec.errors import StartupError
from kvstore_service import signals

_CHECK_PERIOD_S = 2.0


def serve(
    nodes: Annotated[
        str | None,
        typer.Option(help="Storage nodes on this machine.", metavar="INTEGER", show_default="1"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="DRAM of each storage node, such as 4GiB.", show_default="1GiB")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port; port 0 takes any free one.", show_default="127.0.0.1:7420"),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of the catalogue and of the nodes' disks.",
            metavar="PATH",
            show_default="a temporary one",
        ),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            help="Disk of each storage node, such as 100GiB, below --data-dir.", show_default="none"
        ),
    ] = None,
    durability: Annotated[
        str | None,
        typer.Option(
            help="Of a put: memory (on disk later), relaxed (on disk when acknowledged) or durable (synced).",
            show_default="relaxed",
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="What is evicted first: value, lru or s3-fifo.", show_default="value")
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Nodes that each chunk is put on.",
            metavar="INTEGER",
            show_default="1, or 2 on a Ray cluster",
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(help="redis://... that keeps the catalogue.", show_default="a file in --data-dir"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster to run on, a storage node on each of its nodes.", show_default="an own one"
        ),
    ] = None,
    repair_bandwidth: Annotated[
        str | None,
        typer.Option(help="Bytes a second each node copies to others at most.", show_default="100MiB"),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(help="PEM certificate of the bulk ports.", metavar="PATH", show_default="plain TCP"),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(help="Its PEM key.", metavar="PATH", show_default="none")
    ] = None,
    metrics_port: Annotated[
        str | None, typer.Option(help="Port for Prometheus.", metavar="INTEGER", show_default="none")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="A .yaml or .toml file with these settings, a regular one.", metavar="PATH"),
    ] = None,
) -> None:
    """Run a cluster in the foreground: one line when it is ready, a clean stop on SIGTERM, SIGHUP or Ctrl-C.

    Each option may also be a KVSTORE_* variable (--durability: KVSTORE_NODE_DURABILITY) or stand in the file; one that
    is empty is not set.

    Ends with exit status 1 when the cluster is lost."""
    from kvstore_service.settings import load_settings

    settings = load_settings(
        Path(config).expanduser() if config else None,
        nodes=nodes,
        memory=memory,
        listen=listen,
        data_dir=data_dir,
        disk=disk,
        durability=durability,
        policy=policy,
        replicas=replicas,
        redis=redis,
        ray_address=ray_address,
        repair_bandwidth=repair_bandwidth,
        tls_cert=tls_cert,
        tls_key=tls_key,
        metrics_port=metrics_port,
    )
    # No handler: Ray's calls would be broken off wherever they stand.
    stopping = signals.block()

    from kvstore_cluster.durability import Durability
    from kvstore_service.cluster_stats import cluster_stats
    from kvstore_service.embedded import EmbeddedCluster
    from kvstore_service.listen import Address
    from kvstore_service.metrics import ClusterCollector, metrics_endpoint

    cluster = EmbeddedCluster(
        nodes=settings.nodes,
        memory_bytes=settings.memory,
        disk_bytes=settings.disk,
        listen=settings.listen,
        data_dir=settings.data_dir,
        durability=Durability[settings.durability.upper()],
        policy=settings.policy,
        replicas=settings.replicas,
        redis_url=settings.redis.get_secret_value() if settings.redis else None,
        ray_address=settings.ray_address,
        repair_bandwidth_bps=8 * settings.repair_bandwidth,
        tls=(settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None,
    )
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
