"""Measure whether answer times tell a chunk of another tenant from a chunk that nobody stored.

    python benchmarks/miss_times.py [--requests 2000] [--json F] [--plot F.png]

A node with credentials runs in a process of its own, over plain TCP and over TLS, and stores chunks of the tenants
`acme` and `rival`. A worker of `acme` looks up chunks over gRPC and reads them from the bulk port, one at a time, in
random order: its own, those of `rival`, and those that nobody stored. If the node leaked nothing, the times of the last
two kinds have one distribution: the Kolmogorov-Smirnov distance between them then exceeds its critical value in 5 % of
all runs. The distance to the times of its own chunks shows what a leak would look like. Rows: {transport, operation,
requests, KIND_p50_ms, KIND_p99_ms, ks, ks_critical, ks_own}.
"""

import contextlib
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings
from kvstore_client.transport import BulkTransport, Connections, ReceiveMemory
from kvstore_codec.errors import ChunkNotFoundError
from tests.authority import Authority
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.secured import SecuredCluster, put_steps, ref

_CHUNKS = 128
_FRAME_BYTES = 500
_KINDS = ("rival", "absent", "own")
_TIMEOUT_S = 30.0
_WARM_UP = 200
_CRITICAL = 1.358
"""Of the Kolmogorov-Smirnov distance at 5 %, times sqrt(2 / n) for two samples of n."""
_SPAWN = multiprocessing.get_context("spawn")
Ask = Callable[[SampleChunk], bool]
Times = dict[str, list[float]]


def _chunks(kind: str) -> list[SampleChunk]:
    first = _KINDS.index(kind) * _CHUNKS
    return [sample_chunk(first + number, frame_bytes=_FRAME_BYTES) for number in range(_CHUNKS)]


def _serve(folder: Path, tls: dict[str, Path], parent: Connection) -> None:
    """The process of the node. Says where it listens, and its callers' tokens."""
    cluster = SecuredCluster(folder, **tls)
    ca = {"tls_ca": tls["tls_ca"]} if tls else {}
    tokens = {tenant: cluster.token(tenant) for tenant in ("acme", "rival")}
    for tenant, kind in (("acme", "own"), ("rival", "rival")):
        stub = cluster.nodes(tokens[tenant], **ca)
        for chunk in _chunks(kind):
            (reply,) = stub.Put(iter(put_steps(chunk)), timeout=_TIMEOUT_S)
            if reply.status != pb.PUT_STATUS_STORED:
                raise RuntimeError("a chunk was not stored")
    parent.send((cluster.storage.address, cluster.bulk.address, tokens["acme"]))
    parent.recv()
    cluster.close()


@contextlib.contextmanager
def _asking(folder: Path, *, encrypted: bool) -> Iterator[dict[str, Ask]]:
    """What asks a running node for a chunk, by operation. Each says whether it was found."""
    tls: dict[str, Path] = {}
    if encrypted:
        authority = Authority(folder / "files")
        pair = authority.sign("server")
        tls = {"tls_cert": pair.certificate, "tls_key": pair.key, "tls_ca": authority.certificate}
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(folder, tls, theirs))
    process.start()
    storage, bulk, token = ours.recv()
    given: dict[str, Any] = {"token": token} | ({"tls_ca": tls["tls_ca"]} if encrypted else {})
    connector = Connector(SecuritySettings.model_validate(given))
    host, _, port = bulk.rpartition(":")
    connections = Connections(host, int(port), connector.tls_context, host, token=connector.token)
    transport = BulkTransport(connections, ReceiveMemory())
    with connector.channel(storage) as channel:
        stub = rpc.StorageStub(channel)

        def lookup(chunk: SampleChunk) -> bool:
            request = pb.LookupRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], with_headers=True)
            return bool(stub.Lookup(request, timeout=_TIMEOUT_S).answers[0].encoding)

        def read(chunk: SampleChunk) -> bool:
            request = pb.ReadRequest(chunks=[ref(chunk)], encodings=[chunk.encoding], ranges=[pb.ReadRange()])
            try:
                return sum(len(piece.data) for piece in transport.read(request, _TIMEOUT_S)) > 0
            except ChunkNotFoundError:
                return False

        yield {"lookup": lookup, "read": read}
    transport.close()
    ours.send("end")
    process.join()


def _times(ask: Ask, requests: int, order: random.Random) -> Times:
    """Seconds of each request, by kind of chunk."""
    chunks = {kind: _chunks(kind) for kind in _KINDS}
    times: Times = {kind: [] for kind in _KINDS}
    todo = [kind for kind in _KINDS for _ in range(requests)]
    order.shuffle(todo)
    for number, kind in enumerate([*order.choices(_KINDS, k=_WARM_UP), *todo]):
        chunk = order.choice(chunks[kind])
        began_s = time.perf_counter()
        found = ask(chunk)
        took_s = time.perf_counter() - began_s
        if found != (kind == "own"):
            raise RuntimeError(f"wrong answer for a chunk of the kind {kind}")
        if number >= _WARM_UP:
            times[kind].append(took_s)
    return times


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The Kolmogorov-Smirnov distance of two samples: the largest difference of their distribution functions."""
    import numpy as np

    points = np.concatenate([one, other])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def main(
    requests: Annotated[int, typer.Option(min=100, help="Requests of each kind and operation.")] = 2000,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("the distributions")] = None,
) -> None:
    """Measure whether answer times tell a chunk of another tenant from one that nobody stored."""
    order = random.Random(1)
    measured: dict[tuple[str, str], Times] = {}
    for transport, encrypted in (("tcp", False), ("tls", True)):
        with tempfile.TemporaryDirectory() as folder, _asking(Path(folder), encrypted=encrypted) as asks:
            for operation, ask in asks.items():
                measured[transport, operation] = _times(ask, requests, order)
    rows = [_row(*key, times) for key, times in measured.items()]
    print(*rows, sep="\n")
    write_results(rows, json_file, {"chunks_of_each_kind": _CHUNKS})
    if plot is not None:
        _plot(measured, plot)


def _row(transport: str, operation: str, times: Times) -> dict[str, Any]:
    count = len(times["own"])
    row: dict[str, Any] = {"transport": transport, "operation": operation, "requests": count}
    for kind, seconds in times.items():
        row[f"{kind}_p50_ms"] = 1e3 * statistics.median(seconds)
        row[f"{kind}_p99_ms"] = 1e3 * sorted(seconds)[int(0.99 * count)]
    return row | {
        "ks": distance(times["rival"], times["absent"]),
        "ks_critical": _CRITICAL * (2 / count) ** 0.5,
        "ks_own": distance(times["own"], times["absent"]),
    }


def _plot(measured: dict[tuple[str, str], Times], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axes, ((transport, operation), times) in zip(panels.flat, measured.items(), strict=True):
        for kind, style in zip(_KINDS, ("-", "--", ":"), strict=True):
            ordered = sorted(1e3 * seconds for seconds in times[kind])
            axes.plot(ordered, [(n + 1) / len(ordered) for n in range(len(ordered))], style, label=kind)
        axes.set_title(f"{operation}, {transport}", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("ms")
        axes.grid(visible=True, alpha=0.3)
    panels[0][0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
