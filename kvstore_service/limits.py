"""The limits of the service's ports, in one table. Each constant is where it is used; docs/security.md shows the table
(`python -m kvstore_service.limits`)."""

from dataclasses import dataclass

from kvstore_api import frames
from kvstore_client import logs
from kvstore_cluster import coordinator, forgettings, forgotten, leases, listing, names, tallies
from kvstore_cluster.canaries import refusals, registry
from kvstore_cluster.index import MAX_CHUNK_BYTES
from kvstore_service import (
    grpc_server,
    grpc_storage,
    large_requests,
    metrics_server,
    stalled_streams,
    unary_requests,
    unsent_answers,
    verifications,
    wire,
)
from kvstore_service.bulk_server import server as bulk
from kvstore_service.events import publisher, sockets
from kvstore_service.identity import credential, document
from kvstore_service.observability import fetch_log

GRPC, BULK, METRICS, EVENTS, CLUSTER = "gRPC", "bulk", "metrics", "events", "cluster"


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit of a kind of port, or of the whole cluster. `beyond` says what happens beyond it."""

    where: str
    what: str
    value: float
    beyond: str
    unit: str = ""
    """`bytes`, `s`, or empty for a number of things."""

    @property
    def shown(self) -> str:
        if self.unit == "bytes":
            return _shown_bytes(int(self.value))
        return f"{self.value:,.12g}" + (f" {self.unit}" if self.unit else "")


_MEMORY, _MEASURED = "memory of such a connection after its TLS handshake", "measured"
_CLOSED = "closed at once"
_REFUSED = "refused: RESOURCE_EXHAUSTED"
_INVALID = "refused: INVALID_ARGUMENT"
_REPLACES = "another such connection is closed: the oldest one of the network with the most"
_CANCELS = "another such call is cancelled: the oldest one of the {} with the most"
_IDLE = "the connection that has been idle longest is closed; if none is idle, refused"

LIMITS: tuple[Limit, ...] = (
    # Strangers: before a credential.
    Limit(GRPC, "open connections of a port", grpc_server.MAX_CONNECTIONS, _CLOSED),
    Limit(GRPC, _MEMORY, grpc_server.STRANGER_BYTES, _MEASURED, "bytes"),
    Limit(GRPC, "TLS and HTTP/2 handshakes together", grpc_server.HANDSHAKE_S, "closed", "s"),
    Limit(GRPC, "time without a call", grpc_server.IDLE_S, "closed", "s"),
    Limit(GRPC, "headers of a call", grpc_server.MAX_METADATA_BYTES, _REFUSED, "bytes"),
    Limit(
        GRPC,
        "calls without a credential whose request has not come (health checks)",
        unary_requests.MAX_RECEIVING_OF_STRANGERS,
        _CANCELS.format("network"),
    ),
    Limit(BULK, "connections that are not identified", bulk.MAX_STRANGERS, _REPLACES),
    Limit(BULK, _MEMORY, bulk.STRANGER_BYTES, _MEASURED, "bytes"),
    Limit(BULK, "TLS handshake, preface and token together", bulk.STRANGER_S, "closed", "s"),
    Limit(BULK, "token", frames.MAX_TOKEN_BYTES, "refused", "bytes"),
    Limit(METRICS, "connections whose request has not come", metrics_server.MAX_CONNECTIONS, _REPLACES),
    Limit(METRICS, _MEMORY, metrics_server.STRANGER_BYTES, _MEASURED, "bytes"),
    Limit(METRICS, "TLS handshake and request together", metrics_server.PATIENCE_S, "closed", "s"),
    Limit(METRICS, "request", metrics_server.MAX_REQUEST_BYTES, "closed", "bytes"),
    Limit(EVENTS, "ZeroMQ handshake, with credentials CURVE included", sockets.HANDSHAKE_S, "closed", "s"),
    Limit(EVENTS, "subscription or request for missed batches", sockets.MAX_REQUEST_BYTES, "closed", "bytes"),
    # Connections and requests of identified callers.
    Limit(BULK, "connections of identified callers", bulk.MAX_CONNECTIONS, _IDLE),
    Limit(BULK, "of these, of one tenant", bulk.MAX_CONNECTIONS_OF_TENANT, _IDLE),
    Limit(BULK, "time without a request", bulk.IDLE_S, "closed", "s"),
    Limit(BULK, "time to send 4 MiB, or to receive 1 MiB", bulk.PATIENCE_S, "closed", "s"),
    Limit(METRICS, "requests being answered", metrics_server.MAX_SCRAPES, "503"),
    Limit(EVENTS, "batches that wait for a subscriber", sockets.MAX_WAITING, "it misses the next ones"),
    Limit(EVENTS, "requests for missed batches being answered", publisher.MAX_REPLAYS, "others wait"),
    Limit(GRPC, "calls in progress", grpc_server.MAX_CALLS, _REFUSED),
    Limit(
        GRPC, "of these, of one connection", grpc_server.MAX_CALLS_OF_CONNECTION, "held back by the client"
    ),
    Limit(GRPC, "of these, streams", grpc_server.MAX_STREAMS, _REFUSED),
    Limit(GRPC, "of these, of one tenant", grpc_server.MAX_STREAMS_OF_TENANT, _REFUSED),
    Limit(GRPC, "calls in progress with one request and one answer", unary_requests.MAX_UNARY, _REFUSED),
    Limit(GRPC, "of these, of one tenant", unary_requests.MAX_UNARY_OF_TENANT, _REFUSED),
    Limit(
        GRPC,
        "besides these, of operators, nodes and dashboards of all tenants",
        unary_requests.MAX_UNARY_OF_OPERATORS,
        _REFUSED,
    ),
    Limit(
        GRPC,
        "calls of identified callers whose request has not come",
        unary_requests.MAX_RECEIVING,
        _CANCELS.format("tenant"),
    ),
    Limit(GRPC, "time for the request of a call to come", unary_requests.REQUEST_S, "cancelled", "s"),
    Limit(GRPC, "time to read an answer of a stream", stalled_streams.PATIENCE_S, "cancelled", "s"),
    Limit(GRPC, "time between two messages of a client's stream", stalled_streams.SILENT_S, "cancelled", "s"),
    Limit(
        f"{GRPC}, {BULK}",
        f"requests of more than {large_requests.SMALL_BYTES >> 10} KiB, of which one is served and others wait",
        large_requests.MAX_WAITING + 1,
        _REFUSED,
    ),
    Limit(f"{GRPC}, {BULK}", "of these, of one connection", large_requests.MAX_WAITING_OF_PEER + 1, _REFUSED),
    Limit(f"{GRPC}, {BULK}", "time that such a request waits", large_requests.PATIENCE_S, _REFUSED, "s"),
    Limit(
        GRPC, "answers that nobody has read", unsent_answers.MAX_BYTES, "the oldest are cancelled", "bytes"
    ),
    Limit(
        GRPC,
        "of these, of one connection",
        unsent_answers.MAX_BYTES_OF_PEER,
        "the oldest are cancelled",
        "bytes",
    ),
    Limit(GRPC, "verifications of a node, one of each tenant", verifications.MAX_VERIFICATIONS, _REFUSED),
    # Sizes.
    Limit(GRPC, "message to a server", grpc_server.MAX_MESSAGE_BYTES, _REFUSED, "bytes"),
    Limit(GRPC, "request that names no chunks", grpc_server.SMALL_REQUEST_BYTES, _INVALID, "bytes"),
    Limit(GRPC, "answer", grpc_server.MAX_REPLY_BYTES, _REFUSED, "bytes"),
    Limit(GRPC, "headers of chunks in an answer", grpc_storage.MAX_HEADER_BYTES, _REFUSED, "bytes"),
    Limit(BULK, "request for a read", frames.MAX_READ_REQUEST_BYTES, "refused", "bytes"),
    Limit(BULK, "start of a put", frames.MAX_PUT_START_BYTES, "refused", "bytes"),
    Limit(f"{GRPC}, {BULK}", "chunks in a request", wire.MAX_CHUNKS, _INVALID),
    Limit(f"{GRPC}, {BULK}", "encodings in a request", wire.MAX_ENCODINGS, _INVALID),
    Limit(f"{GRPC}, {BULK}", "ranges in a read", wire.MAX_RANGES, _INVALID),
    Limit(GRPC, "chunks in a page of a listing", listing.MAX_LISTED, "the next page has the rest"),
    Limit(f"{GRPC}, {BULK}", "chunk", MAX_CHUNK_BYTES, "the put is refused", "bytes"),
    # Names and what is kept of them.
    Limit(CLUSTER, "name of a tenant", names.MAX_TENANT_BYTES, _INVALID, "bytes"),
    Limit(CLUSTER, "tenants with chunks on a node", names.MOST_NAMES, "the put is refused"),
    Limit(CLUSTER, "encodings of a tenant's chunks on a node", names.MOST_ENCODINGS, "the put is refused"),
    Limit(
        CLUSTER, "calibrations of a tenant's chunks on a node", names.MOST_CALIBRATIONS, "the put is refused"
    ),
    Limit(CLUSTER, "name of an encoding, characters", wire.MAX_ENCODING_CHARACTERS, "the put is refused"),
    Limit(CLUSTER, "file of credentials", document.MAX_DOCUMENT_BYTES, "not read", "bytes"),
    Limit(CLUSTER, "name of a credential, characters", credential.MAX_NAME_CHARACTERS, "not added"),
    Limit(CLUSTER, "subject of a credential, characters", credential.MAX_SUBJECT_CHARACTERS, "not added"),
    Limit(CLUSTER, "leased chunks of a node", leases.MAX_LEASED, "the lookup gets no lease"),
    Limit(CLUSTER, "of these, of one tenant", leases.MAX_LEASED_OF_TENANT, "the lookup gets no lease"),
    Limit(CLUSTER, "lease", leases.MAX_LEASE_S, "it ends", "s"),
    Limit(CLUSTER, "pinned chunks of a tenant", coordinator.MAX_PINS_OF_TENANT, _REFUSED),
    Limit(
        CLUSTER,
        f"pinned chunks of all tenants, besides the first {coordinator.RESERVED_PINS} of each",
        coordinator.MAX_PINS,
        _REFUSED,
    ),
    Limit(CLUSTER, "tenants with pins", coordinator.MAX_PINNING_TENANTS, _REFUSED),
    Limit(CLUSTER, "tenants with a quota", coordinator.MAX_QUOTAS, _REFUSED),
    Limit(
        CLUSTER,
        f"forgettings of a tenant in {forgettings.FORGETTINGS_PERIOD_S:g} s",
        forgettings.MAX_FORGETTINGS,
        _REFUSED,
    ),
    Limit(
        CLUSTER,
        "forgotten tenants kept by name",
        forgotten.MAX_FORGOTTEN,
        "a node that has missed an older one removes all of its chunks",
    ),
    Limit(CLUSTER, "canaries", registry.MAX_MODELS, "one of the tenant with the most is dropped"),
    Limit(
        CLUSTER, "models with refusals", refusals.MAX_MODELS, "one of the tenant with the most is forgotten"
    ),
    Limit(CLUSTER, "refusing workers of a model", refusals.MAX_OF_A_MODEL, "the oldest is forgotten"),
    Limit(
        CLUSTER, "fetches that workers report", fetch_log.MOST_FETCHES, "the tenant with the most loses one"
    ),
    Limit(CLUSTER, "tenants that a node counts one by one", tallies.MOST_TENANTS, "the others are added up"),
    Limit(CLUSTER, "log lines that a process keeps", logs.MOST_RECENT, "the oldest is forgotten"),
)


def table() -> str:
    """The limits as a table in Markdown."""
    lines = ["| port | limit of | value | beyond it |", "| --- | --- | --- | --- |"]
    lines += [f"| {limit.where} | {limit.what} | {limit.shown} | {limit.beyond} |" for limit in LIMITS]
    return "".join(f"{line}\n" for line in lines)


def _shown_bytes(size_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes + 1 >= size:
            return f"{round(size_bytes / size, 1):g} {unit}"
    return f"{size_bytes} bytes"


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
