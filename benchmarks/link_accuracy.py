"""Measure the accuracy and the processor time of the user-space link.

    python benchmarks/link_accuracy.py --bandwidths 10mbit,1gbit,5gbit --seconds 1 --json F --plot F.png

Sender and receiver are separate processes, so that `cpu_cores` is the processor time of the link only. Values are
medians of `--repeats` transfers. Rows: {bandwidth_bps, measured_bps, error_percent, cpu_cores, bytes}."""

import multiprocessing
import resource
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_bench.shaping import ShapedLink
from kvstore_service.bandwidth import parse_bandwidth

PIECE_BYTES = 1 << 20


def main(
    bandwidths: Annotated[
        str, typer.Option(help="Bandwidths of the link, comma-separated.")
    ] = "1mbit,10mbit,50mbit,200mbit,1gbit,2.5gbit,5gbit,10gbit",
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of a transfer, in seconds.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Transfers per bandwidth.")] = 5,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("the error over bandwidth")] = None,
) -> None:
    """Measure the accuracy and the processor time of the user-space link."""
    rates = [parse_bandwidth(text) for text in bandwidths.split(",")]
    spawn = multiprocessing.get_context("spawn")
    ready, sender_ready = spawn.Pipe(duplex=False)
    orders, receiver_orders = spawn.Pipe()
    sender = spawn.Process(target=_send, args=(sender_ready,), daemon=True)
    receiver = spawn.Process(target=_receive, args=(receiver_orders,), daemon=True)
    sender.start()
    receiver.start()
    target = ready.recv()
    rows = [_measure(target, orders, rate, seconds, repeats) for rate in track(rates, "measuring")]
    sender.terminate()
    receiver.terminate()
    _print(rows)
    write_results(rows, json_file)
    if plot:
        _plot(rows, plot)


def _measure(
    target: str, orders: Connection, rate_bps: float, seconds: float, repeats: int
) -> dict[str, Any]:
    size = int(rate_bps * seconds / 8)
    measured, cores = [], []
    for _ in range(repeats):
        with ShapedLink(target, bandwidth_bps=rate_bps) as link:
            before = resource.getrusage(resource.RUSAGE_SELF)
            orders.send((link.address, size))
            elapsed_s = orders.recv()
            after = resource.getrusage(resource.RUSAGE_SELF)
        measured.append(size * 8 / elapsed_s)
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        cores.append(cpu_s / elapsed_s)
    measured_bps = statistics.median(measured)
    return {
        "bandwidth_bps": rate_bps,
        "measured_bps": round(measured_bps),
        "error_percent": round((measured_bps / rate_bps - 1) * 100, 2),
        "cpu_cores": round(statistics.median(cores), 3),
        "bytes": size,
    }


def _send(ready: Connection) -> None:
    """Serves connections. The first line of a connection is a number; the server sends that many bytes."""
    data = bytes(PIECE_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready.send("{}:{}".format(*listener.getsockname()))
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                missing = int(lines.readline())
                while missing > 0:
                    missing -= connection.send(data[: min(missing, PIECE_BYTES)])


def _receive(orders: Connection) -> None:
    """Executes orders (address, bytes): receives that many bytes and answers with the seconds it took."""
    buffer = bytearray(PIECE_BYTES)
    while True:
        address, missing = orders.recv()
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            started = time.monotonic()
            connection.sendall(f"{missing}\n".encode())
            while missing > 0 and (got := connection.recv_into(buffer)):
                missing -= got
            orders.send(time.monotonic() - started)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="accuracy of the user-space link, medians")
    for column in ("set, Mbit/s", "measured, Mbit/s", "error", "CPU cores"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['bandwidth_bps'] / 1e6:,.0f}", f"{row['measured_bps'] / 1e6:,.1f}",
            f"{row['error_percent']:+.2f} %", f"{row['cpu_cores']:.2f}",
        )  # fmt: skip
    Console().print(table)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    set_mbps = [row["bandwidth_bps"] / 1e6 for row in rows]
    axes.semilogx(set_mbps, [row["error_percent"] for row in rows], "o-")
    axes.axhspan(-5, 5, alpha=0.15)
    axes.set_xlabel("bandwidth that was set, Mbit/s")
    axes.set_ylabel("error, percent")
    figure.tight_layout()
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    typer.run(main)
