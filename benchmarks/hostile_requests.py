"""Measure a client of a storage node while attackers send the node the largest requests it accepts.

python benchmarks/hostile_requests.py [--attackers 12] [--seconds 10] [--attack NAME ...]

Attacks:

headers, misses, contexts, empty   lookups
delete, report, read               other calls
answers                            short lookups whose reply is 47 MiB of headers, 24 concurrent ones
unread                             lookups whose reply is almost 1 MiB of headers and is never received, ten per second
                                   and connection

One process with `--attackers` connections repeats the request without a pause. Unless noted, each connection has one
request at a time. Meanwhile the client looks up 256 chunks and reads one chunk, ten times per second. Prints JSON: of
each attack, the client's latencies, the growth of the node's memory, and how long the node stays busy afterwards.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import grpc
import psutil
from deaf_client import DeafClient

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ROOT_PREFIX, ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

ATTACKS = ("headers", "misses", "contexts", "empty", "delete", "report", "read", "answers", "unread")
REFERENCES = 65_536
LOOKED_UP = 256
_ENCODING = "exact-raw"
_STORED = 10_000
_CONTEXTS = 1024
_PERIOD_S = 0.1
_TIMEOUT_S = 5.0
_QUIET_CPU = 0.1
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
_GEOMETRY = Geometry(layers=8, kv_heads=1, head_dim=1, dtype=KVDtype.BFLOAT16, period_layers=1)
_WIDE_GEOMETRY = Geometry(layers=1024, kv_heads=1, head_dim=1, dtype=KVDtype.BFLOAT16, period_layers=1)
_WIDE = 1 << 31
"""Number of the chunk with a header of 49 KB."""
_WIDE_HEADER_BYTES = 49 << 10
_IN_FLIGHT = 24
"""Concurrent calls of the attack `answers`."""


def chunk_id(number: int, context: int | None = None) -> ChunkId:
    return ChunkId(
        ContentId(number.to_bytes(32, "little")),
        ROOT_PREFIX if context is None else PrefixId(context.to_bytes(32, "big")),
    )


def reference(chunk: ChunkId) -> pb.ChunkRef:
    return pb.ChunkRef(content_id=chunk.content_id, prefix_id=chunk.prefix_id)


def steps(chunks: list[ChunkId], geometry: Geometry = _GEOMETRY) -> Iterator[pb.PutRequest]:
    """The messages of a put of small chunks."""
    encoding = Encoding.parse(_ENCODING)
    frames = [bytes(16)] * geometry.frame_count
    for chunk in chunks:
        header, data = write_header(bytes(32), chunk, encoding, geometry, frames)
        start = pb.PutStart(chunk=reference(chunk), encoding=_ENCODING, size_bytes=header.size_bytes)
        yield pb.PutRequest(start=start)
        yield pb.PutRequest(data=data + b"".join(frames))
        yield pb.PutRequest(end=pb.PutEnd())


def attack(kind: str) -> tuple[str, bytes]:
    """The request of an attack: the name of the call and the encoded message."""
    many = [reference(chunk_id(number % _STORED)) for number in range(REFERENCES)]
    match kind:
        case "headers":
            request = pb.LookupRequest(chunks=many, encodings=[_ENCODING], with_headers=True, lease_ms=60_000)
        case "misses":
            unknown = [reference(chunk_id((1 << 40) + number)) for number in range(REFERENCES)]
            return "Lookup", pb.LookupRequest(chunks=unknown, encodings=[_ENCODING]).SerializeToString()
        case "contexts":
            other = [reference(chunk_id(1 << 30, (1 << 40) + number)) for number in range(REFERENCES)]
            request = pb.LookupRequest(chunks=other, encodings=["high-raw"], any_context=True)
        case "delete":
            unknown = [reference(chunk_id((1 << 40) + number)) for number in range(REFERENCES)]
            return "Delete", pb.DeleteRequest(chunks=unknown).SerializeToString()
        case "report":
            return "Report", pb.ReportRequest(chunks=many, scores=[0.5] * REFERENCES).SerializeToString()
        case "read":
            ranges = [pb.ReadRange(chunk=0, first_frame=0, frame_count=1)] * (1 << 18)
            return "Read", pb.ReadRequest(
                chunks=many[:1], encodings=[_ENCODING], ranges=ranges
            ).SerializeToString()
        case "answers" | "unread":
            answer_bytes = (47 << 20) if kind == "answers" else (1 << 20)
            wide = [reference(chunk_id(_WIDE))] * (answer_bytes // _WIDE_HEADER_BYTES)
            request = pb.LookupRequest(chunks=wide, encodings=[_ENCODING], with_headers=True)
        case "empty":
            return "Lookup", b"\x0a\x00" * (4 << 20)
    return "Lookup", request.SerializeToString()


def attackers(address: str, kind: str, count: int) -> None:
    """Attacks the node until a line or the end of stdin. Then prints the counts of status codes and ends the
    process."""
    call, request = attack(kind)
    answers = {"sent": 0}
    free = threading.Semaphore(_IN_FLIGHT)

    def repeat_unread() -> None:
        while True:
            client = DeafClient(address)
            with contextlib.suppress(OSError):
                while not client.disconnected.is_set():
                    client.ask(call, request)
                    answers["sent"] += 1
                    time.sleep(_PERIOD_S)
            client.close()

    def repeat_at_once() -> None:
        with grpc.insecure_channel(address, _OPTIONS) as channel:
            lookup = channel.unary_unary(f"/kvstore.v1.Storage/{call}")
            while True:
                free.acquire()
                answers["sent"] += 1
                lookup.future(request).add_done_callback(ended)

    def ended(lookup: grpc.Future) -> None:
        free.release()
        outcome = lookup.code().name
        answers[outcome] = answers.get(outcome, 0) + 1

    def repeat() -> None:
        with grpc.insecure_channel(address, _OPTIONS) as channel:
            method = f"/kvstore.v1.Storage/{call}"
            while True:
                answers["sent"] += 1
                try:
                    if call == "Read":
                        for _ in channel.unary_stream(method)(request):
                            pass
                    else:
                        channel.unary_unary(method)(request)
                    outcome = "OK"
                except grpc.RpcError as error:
                    outcome = error.code().name
                answers[outcome] = answers.get(outcome, 0) + 1

    target = {"answers": repeat_at_once, "unread": repeat_unread}.get(kind, repeat)
    for _ in range(count):
        threading.Thread(target=target, daemon=True).start()
    print("attacking", flush=True)
    sys.stdin.readline()
    print(json.dumps(answers), flush=True)
    os._exit(0)


def timed_ms(call: Callable[[], object]) -> float | None:
    """Milliseconds of a call. None if it failed."""
    begin = time.perf_counter()
    try:
        call()
    except grpc.RpcError as error:
        print(error.code().name, file=sys.stderr)
        return None
    return 1000 * (time.perf_counter() - begin)


def summary(times_ms: list[float | None]) -> dict[str, float]:
    """Counts and percentiles of calls; None stands for a failed one."""
    ordered = sorted(time_ms for time_ms in times_ms if time_ms is not None)
    counts = {"calls": len(times_ms), "failed": len(times_ms) - len(ordered)}
    if not ordered:
        return counts
    return counts | {
        "p50_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[int(0.99 * len(ordered))], 1),
        "max_ms": round(ordered[-1], 1),
    }


def busy_for_s(node: psutil.Process) -> float:
    """Seconds until the node has been idle for half a second. At most 120."""
    begin = time.monotonic()
    rest_since = begin
    while time.monotonic() - rest_since < 0.5 and time.monotonic() - begin < 120:
        if node.cpu_percent(0.1) > 100 * _QUIET_CPU:
            rest_since = time.monotonic()
    return round(rest_since - begin, 1)


@contextlib.contextmanager
def running_node() -> Iterator[tuple[str, psutil.Process]]:
    """A node that stores what the requests name: its address and its process."""
    server = subprocess.Popen(
        [sys.executable, "-m", "kvstore_bench.store.server", "kvstore"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = _pipe(server.stdout).readline().strip().split(",")[0]
        with grpc.insecure_channel(address, _OPTIONS) as channel:
            stub = rpc.StorageStub(channel)
            stored = [chunk_id(number) for number in range(_STORED)]
            stored += [chunk_id(1 << 30, context) for context in range(_CONTEXTS)]
            for begin in range(0, len(stored), 1000):
                replies = list(stub.Put(steps(stored[begin : begin + 1000])))
                if any(reply.status != pb.PUT_STATUS_STORED for reply in replies):
                    raise RuntimeError("the chunks for the requests were not stored")
            list(stub.Put(steps([chunk_id(_WIDE)], _WIDE_GEOMETRY)))
        yield address, psutil.Process(server.pid)
    finally:
        _pipe(server.stdin).close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def measure(address: str, node: psutil.Process, kind: str, count: int, seconds: float) -> dict[str, object]:
    """Attacks a node, and measures a client alone and during the attack."""
    attacking: subprocess.Popen[str] | None = None
    watching = threading.Event()
    try:
        with grpc.insecure_channel(address, _OPTIONS) as channel:
            stub = rpc.StorageStub(channel)
            looked_up = [reference(chunk_id(number)) for number in range(LOOKED_UP)]
            lookup = pb.LookupRequest(
                chunks=looked_up, encodings=[_ENCODING], with_headers=True, lease_ms=1000
            )
            read = pb.ReadRequest(
                chunks=looked_up[:1], encodings=[_ENCODING], ranges=[pb.ReadRange(frame_count=8)]
            )
            calls: dict[str, Callable[[], object]] = {
                "lookup": lambda: stub.Lookup(lookup, timeout=_TIMEOUT_S),
                "read": lambda: list(stub.Read(read, timeout=_TIMEOUT_S)),
            }

            def beside(seconds: float) -> dict[str, dict[str, float]]:
                times: dict[str, list[float | None]] = {name: [] for name in calls}
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    for name, call in calls.items():
                        times[name].append(timed_ms(call))
                    time.sleep(_PERIOD_S)
                return {name: summary(times_ms) for name, times_ms in times.items()}

            alone = beside(2)
            before = node.memory_info().rss
            rss = [before]

            def watch() -> None:
                while not watching.wait(0.05):
                    rss.append(node.memory_info().rss)

            threading.Thread(target=watch, daemon=True).start()
            attacking = subprocess.Popen(
                [sys.executable, __file__, "--attack", kind, "--attackers", str(count), "--at", address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            _pipe(attacking.stdout).readline()
            attacked = beside(seconds)
            _pipe(attacking.stdin).close()
            answers = json.loads(_pipe(attacking.stdout).readline())
            attacking.wait()
            busy_s = busy_for_s(node)
            return {
                "attack": kind,
                "attackers": count,
                "answers": answers,
                "alone": alone,
                "attacked": attacked,
                "rss_growth_mib": (max(rss) - before) >> 20,
                "busy_after_s": busy_s,
                "leases_after": stub.Stats(pb.StatsRequest()).leases,
            }
    finally:
        watching.set()
        if attacking is not None:
            attacking.kill()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("a process was started without pipes")
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="may be repeated; all by default")
    parser.add_argument("--attackers", type=int, default=12, help="number of connections")
    parser.add_argument("--seconds", type=float, default=10, help="duration of the attack")
    parser.add_argument("--at", help=argparse.SUPPRESS)  # the node's address, in the attacking process
    arguments = parser.parse_args()
    kinds = arguments.attack or ATTACKS
    if arguments.at:
        attackers(arguments.at, kinds[0], arguments.attackers)
    else:
        with running_node() as (address, node):
            reports = [measure(address, node, kind, arguments.attackers, arguments.seconds) for kind in kinds]
        print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
