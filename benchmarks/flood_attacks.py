"""Floods of a running service. Each attack runs in a process of its own until a time, and says what it reached."""

import contextlib
import errno
import itertools
import resource
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import grpc
from flood_target import HTTP2, SOURCE, Target, address_of, bulk_connection, tls_connection
from pydantic import SecretStr

from kvstore_api.frames import PREFACE, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.settings import SecuritySettings
from kvstore_codec.errors import UnauthenticatedError
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import token_digest
from kvstore_service.identity.file import changing, read_credentials
from tests.half_calls import half_calls
from tests.sample_chunk import sample_chunk
from tests.service.bulk_port import put_frame, ref

_OPENED_PER_S, _OPENED_AGAIN_PER_S = 5000, 500
_LOOK_S = 0.5
_PIECE = bytes(1 << 20)
_CHECK, _LOOKUP = "/grpc.health.v1.Health/Check", "/kvstore.v1.Storage/Lookup"
_CALLS = 240
"""Calls of one connection, which may have up to 256."""
_TENANTS_AT_ONCE = 100
_EFFECT_S = 60.0
_LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]


Attack = Callable[[Target, int, float], str]
"""Attacks with a number of connections, requests or tenants until a monotonic time. Returns what was reached."""


def connections(target: Target, count: int, until_s: float, source: str = SOURCE) -> str:
    """Opens plain TCP connections to all ports in turn, and others for those that the service closes, up to 500 a
    second."""
    return _kept_open(target, count, until_s, b"", source)


def connections_of_one_address(target: Target, count: int, until_s: float) -> str:
    """The same from the address of the honest client."""
    return connections(target, count, until_s, "127.0.0.1")


def half_open_handshakes(target: Target, count: int, until_s: float) -> str:
    """Sends the first half of a TLS handshake on each connection."""
    outgoing = ssl.MemoryBIO()
    client = target.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    return _kept_open(target, count, until_s, hello[: len(hello) // 2], SOURCE)


def _kept_open(target: Target, count: int, until_s: float, sent: bytes, source: str) -> str:
    addresses = itertools.cycle(address_of(port) for port in target.ports.values())
    opened = most = failed = 0
    with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
        waiting: dict[socket.socket, tuple[str, int]] = {}
        closing.callback(lambda: [one.close() for one in waiting])
        while time.monotonic() < until_s:
            begun_s = time.monotonic()
            per_s = _OPENED_PER_S if opened < count else _OPENED_AGAIN_PER_S
            for _ in range(min(count - len(waiting), round(per_s * _LOOK_S))):
                address = next(addresses)
                one = socket.socket()
                one.settimeout(0)
                with contextlib.suppress(OSError):
                    one.bind((source, 0))
                if one.connect_ex(address) not in (0, errno.EINPROGRESS):
                    failed += 1
                    one.close()
                    continue
                waiting[one] = address
                selector.register(one, selectors.EVENT_READ | (selectors.EVENT_WRITE if sent else 0), one)
                opened += 1
            while (left_s := begun_s + _LOOK_S - time.monotonic()) > 0:
                for key, events in selector.select(left_s):
                    one: socket.socket = key.data
                    if events & selectors.EVENT_WRITE:
                        with contextlib.suppress(OSError):
                            one.send(sent)
                        selector.modify(one, selectors.EVENT_READ, one)
                    elif _has_ended(one):
                        selector.unregister(one)
                        waiting.pop(one)
                        one.close()
            most = max(most, len(waiting))
    refused = f", {failed} could not be opened" if failed else ""
    return f"{opened:,} opened, {most:,} at once{refused}"


def calls_without_a_request(target: Target, count: int, until_s: float) -> str:
    """Sends the headers of `count` calls at a time and no request: health checks of strangers, and lookups of a tenant.
    Does so again and again, because the service cancels them."""
    kinds = itertools.cycle(
        (("node", _CHECK, ""), ("coordinator", _CHECK, ""), ("node", _LOOKUP, target.tokens["rival"]))
    )
    context = target.context()
    context.set_alpn_protocols(["h2"])
    begun = 0
    while time.monotonic() < until_s:
        with contextlib.ExitStack() as open_ones:
            for port, method, token in itertools.islice(kinds, max(1, count // _CALLS)):
                with contextlib.suppress(OSError):
                    half = half_calls(target.ports[port], method, _CALLS, token, source=SOURCE, tls=context)
                    open_ones.enter_context(half)
                    begun += _CALLS
            time.sleep(2 * _LOOK_S)
    return f"{begun:,} calls begun"


def lookups_of_one_tenant(target: Target, count: int, until_s: float) -> str:
    """Keeps `count` lookups of a tenant in progress."""
    done: Counter[str] = Counter()

    def ask() -> None:
        with target.connector("rival").channel(target.ports["node"], _LOCAL) as channel:
            lookup = rpc.StorageStub(channel).Lookup
            while time.monotonic() < until_s:
                for call in [lookup.future(pb.LookupRequest(), timeout=30) for _ in range(count // 4)]:
                    done["refused" if call.exception() else "answered"] += 1

    _at_once([ask] * 4)
    return f"{done['answered']:,} lookups answered, {done['refused']:,} refused"


def slow_requests(target: Target, count: int, until_s: float) -> str:
    """After the TLS handshake, sends a byte of a request at a time, on each port."""
    requests = {"bulk": PREFACE, "metrics": b"GET /metrics HTTP/1.1\r\n" + b"X-Slow: y\r\n" * 1000}
    waiting: list[tuple[ssl.SSLSocket, Iterator[int]]] = []
    context = target.context()
    context.set_alpn_protocols(["h2"])
    ports = itertools.cycle(target.ports.items())
    made: Counter[str] = Counter()

    def make(port: tuple[str, str]) -> None:
        with contextlib.suppress(OSError):
            plain = socket.create_connection(address_of(port[1]), 5, source_address=(SOURCE, 0))
            one = context.wrap_socket(plain, server_hostname="127.0.0.1")
            waiting.append((one, iter(requests.get(port[0], HTTP2))))
            made[port[0]] += 1

    most = 0
    with ThreadPoolExecutor(16) as pool:
        while time.monotonic() < until_s:
            list(pool.map(make, itertools.islice(ports, min(count - len(waiting), 200))))
            most = max(most, len(waiting))
            for entry in list(waiting):
                one, rest = entry
                try:
                    one.settimeout(1)
                    one.send(bytes([next(rest, 0)]))
                except OSError:
                    waiting.remove(entry)
                    one.close()
            time.sleep(_LOOK_S)
    for one, _ in waiting:
        one.close()
    return f"{made.total():,} opened, {most:,} at once"


def oversized_and_endless_messages(target: Target, count: int, until_s: float) -> str:
    """Messages that are too long or never end, of strangers and of a tenant, on all ports, `count` of each at a
    time."""
    done: Counter[str] = Counter()

    def endless() -> Iterator[bytes]:
        while time.monotonic() < until_s:
            done["MiB"] += 4
            yield bytes(4 << 20)

    def call(caller: str, kind: str) -> None:
        with target.connector(caller).channel(target.ports["node"], _LOCAL) as channel:
            if kind == "endless":
                list(channel.stream_stream("/kvstore.v1.Storage/Put")(endless(), timeout=30))
            else:
                done["MiB"] += 9
                channel.unary_unary("/kvstore.v1.Storage/Lookup")(bytes(9 << 20), timeout=30)

    def bulk(caller: str, header: bytes) -> None:
        with bulk_connection(target, caller) as connected:
            connected.sendall(header)
            while time.monotonic() < until_s:
                connected.sendall(_PIECE)
                done["MiB"] += 1

    def metrics() -> None:
        with tls_connection(target, "metrics") as connected:
            connected.sendall(b"GET /metrics HTTP/1.1\r\n")
            while time.monotonic() < until_s:
                connected.sendall(b"X-Endless: " + bytes(60_000) + b"\r\n")

    kinds: list[Callable[[], None]] = [
        lambda: call("", "endless"),
        lambda: call("rival", "endless"),
        lambda: call("", "oversized"),
        lambda: call("rival", "oversized"),
        lambda: bulk("", b""),
        lambda: bulk("", pack_header(FrameKind.READ, 1 << 62)),
        lambda: bulk("rival", pack_header(FrameKind.READ, 1 << 62)),
        lambda: bulk("rival", put_frame(size_bytes=1 << 29)),
        metrics,
    ]

    def repeat(kind: Callable[[], None]) -> None:
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError, grpc.RpcError):
                kind()
            done["requests"] += 1

    _at_once([lambda kind=kind: repeat(kind) for kind in kinds * count])
    return f"{done['requests']:,} requests of {len(kinds)} kinds, {done['MiB']:,} MiB offered"


def tenants_named_in_requests(target: Target, count: int, until_s: float) -> str:
    """Looks up and stores a chunk for each of `count` tenants."""
    chunk, done = sample_chunk(frame_bytes=10), Counter[str]()
    blocks = iter(range(0, count, _TENANTS_AT_ONCE))
    lock = threading.Lock()

    def steps(names: list[str]) -> Iterator[pb.PutRequest]:
        for tenant in names:
            start = pb.PutStart(
                chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data), tenant=tenant
            )
            yield pb.PutRequest(start=start)
            yield pb.PutRequest(data=chunk.data)
            yield pb.PutRequest(end=pb.PutEnd())

    def ask() -> None:
        with target.connector("everyone").channel(target.ports["node"], _LOCAL) as channel:
            stub = rpc.StorageStub(channel)
            while time.monotonic() < until_s:
                with lock:
                    begin = next(blocks, count)
                if begin == count:
                    return
                names = [f"tenant-{number}" for number in range(begin, min(begin + _TENANTS_AT_ONCE, count))]
                requests = [pb.LookupRequest(chunks=[ref(chunk)], tenant=tenant) for tenant in names]
                with contextlib.suppress(grpc.RpcError):
                    for call in [stub.Lookup.future(request, timeout=30) for request in requests]:
                        done["lookups"] += call.result() is not None
                    for reply in stub.Put(steps(names), timeout=30):
                        done["puts"] += reply.status == pb.PUT_STATUS_STORED

    _at_once([ask] * 2)
    return f"{done['lookups']:,} tenants looked up, {done['puts']:,} stored a chunk"


def tenants_with_credentials(target: Target, count: int, until_s: float) -> str:
    """Adds a credential for each of `count` tenants, and removes them at the end."""
    tokens = [new_token() for _ in range(count)]
    added = [
        Credential(made, f"worker-{number}", f"tenant-{number}", frozenset({Scope.DATA}), token_digest(token))
        for number, (made, token) in enumerate(tokens)
    ]
    with changing(target.credentials) as known:
        before = len(known)
        known += added
    begun_s = time.monotonic()
    connector = Connector(SecuritySettings(token=SecretStr(tokens[-1][1]), tls_ca=target.ca))
    effect_s = 0.0
    with connector.channel(target.ports["node"], _LOCAL) as channel:
        lookup = rpc.StorageStub(channel).Lookup
        while time.monotonic() < until_s or not (effect_s or time.monotonic() > until_s + _EFFECT_S):
            with contextlib.suppress(grpc.RpcError):
                lookup(pb.LookupRequest(), timeout=5)
                effect_s = effect_s or time.monotonic() - begun_s
            time.sleep(0.05)
    size_bytes = target.credentials.stat().st_size
    with changing(target.credentials) as known:
        del known[before:]
    with contextlib.suppress(UnauthenticatedError):
        read_credentials(target.credentials)
    return f"{count:,} credentials in {size_bytes / 1e6:.0f} MB, in effect after {effect_s:.1f} s"


def puts_that_never_end(target: Target, count: int, until_s: float) -> str:
    """Begins puts of a tenant, half over gRPC and half on the bulk port, and sends no more."""
    chunk, done = sample_chunk(7), Counter[str]()
    ended = threading.Event()

    def steps() -> Iterator[pb.PutRequest]:
        start = pb.PutStart(chunk=ref(chunk), encoding=chunk.encoding, size_bytes=len(chunk.data))
        yield pb.PutRequest(start=start)
        yield pb.PutRequest(data=chunk.data[:100])
        ended.wait()

    with contextlib.ExitStack() as open_ones:
        calls = []
        for _ in range(4):
            channel = open_ones.enter_context(target.connector("rival").channel(target.ports["node"], _LOCAL))
            calls += [rpc.StorageStub(channel).Put(steps()) for _ in range(count // 8)]
        for _ in range(count // 2):
            with contextlib.suppress(OSError):
                connected = open_ones.enter_context(bulk_connection(target, "rival"))
                connected.sendall(put_frame(chunk) + chunk.data[:100])
                done["bulk"] += 1
        time.sleep(max(0.0, until_s - time.monotonic()))
        held = sum(not call.done() for call in calls)
        ended.set()
        for call in calls:
            call.cancel()
    return f"{len(calls):,} over gRPC ({held:,} of them held or waiting at the end), {done['bulk']:,} on the bulk port"


def _at_once(tasks: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(tasks)) as pool:
        for task in [pool.submit(task) for task in tasks]:
            task.result()


def _has_ended(one: socket.socket) -> bool:
    try:
        return one.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


ATTACKS: dict[str, tuple[Attack, int, float]] = {
    "connections": (connections, 10_000, 1),
    "connections of the honest address": (connections_of_one_address, 10_000, 1),
    "slow requests": (slow_requests, 400, 1),
    "calls without a request": (calls_without_a_request, 1440, 1),
    "lookups of one tenant": (lookups_of_one_tenant, 1000, 1),
    "half-open TLS handshakes": (half_open_handshakes, 500, 1),
    "oversized and endless messages": (oversized_and_endless_messages, 2, 1),
    "tenants named in requests": (tenants_named_in_requests, 100_000, 6),
    "tenants with credentials": (tenants_with_credentials, 100_000, 2),
    "puts that never end": (puts_that_never_end, 1000, 1),
}
"""Each attack, the number that it is for, and how many times as long as others it lasts."""


def attack(target: Target, parent: Connection) -> None:
    """The process of the attacker: performs the attacks (name, number, seconds) that `parent` asks for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parent.send("ready")
    while True:
        name, count, seconds = parent.recv()
        parent.send(ATTACKS[name][0](target, count, time.monotonic() + seconds))
