"""Every caller with every call, on a real cluster: the tables of docs/security.md.

`python -m tests.service.identity.matrix` prints them.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore_api.frames import HEADER_BYTES, FrameKind, unpack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.canaries import Origin
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.put import PutOptions
from kvstore_service.identity import Scope
from kvstore_service.identity.verbs import COORDINATOR, REFLECTION, STORAGE
from tests.cluster.canaries.test_registry import MODEL, OTHER, sketch
from tests.service.bulk_port import CHUNK, put_frame, read_frame, received
from tests.service.secured import SecuredCluster, put_steps, ref

OWNER, RIVAL = "acme", "rival"
_DATA, _ADMIN, _NODE = Scope.DATA, Scope.ADMIN, Scope.NODE
CALLERS: dict[str, tuple[str | None, Scope]] = {
    "`data`": (OWNER, _DATA),
    "`data` of another tenant": (RIVAL, _DATA),
    "`admin`": (OWNER, _ADMIN),
    "`admin` of another tenant": (RIVAL, _ADMIN),
    "`admin` of `*`": (None, _ADMIN),
    "`node`": (None, _NODE),
    "`metrics`": (None, Scope.METRICS),
}
STRANGERS = ("none", "wrong", "expired", "revoked")
YES, MISS, DENIED, NO = "yes", "as not stored", "denied", "no"
_REFUSED = {grpc.StatusCode.UNAUTHENTICATED: NO, grpc.StatusCode.PERMISSION_DENIED: DENIED}


# Passed the check, but there is no such calibration, canary or node, or the request is incomplete.
_SERVED = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)


@dataclass
class Stage:
    """A cluster that stores one chunk, a pin, a quota and a canary of OWNER, and one caller of it."""

    cluster: SecuredCluster
    token: str = ""
    tenant: str = ""
    """What requests name: OWNER for callers of every tenant, who must say whom they act for."""
    said: list[str] = field(default_factory=list)
    """Messages of refusals."""
    heard: list[float] = field(default_factory=list)
    """Scores that the node applied."""

    @property
    def node(self) -> grpc.Channel:
        return self.cluster.channel(self.cluster.storage.address, self.token)

    def prepare(self) -> None:
        """Restores what an earlier call may have changed."""
        cluster = self.cluster
        for variant in cluster.node.list()[0]:
            if variant.tenant != OWNER:
                cluster.node.delete([variant.chunk_id], variant.tenant)
        options = PutOptions(tenant=OWNER)
        pending = cluster.node.begin_put(CHUNK.chunk_id, CHUNK.encoding, len(CHUNK.data), options=options)
        if pending is not None:
            pending.write(CHUNK.data)
            pending.commit()
        cluster.coordinator.pin([CHUNK.chunk_id], OWNER)
        cluster.coordinator.set_quota(OWNER, 1 << 30)
        for model in (MODEL, OTHER):
            generation = cluster.canaries.get(model, OWNER)[0].generation
            cluster.canaries.put(model, generation, Origin(), sketch(1, model), tenant=OWNER)
        self.heard.clear()

    def lease(self) -> bytes:
        """A lease of OWNER."""
        asked = LookupRequest([CHUNK.chunk_id], [CHUNK.encoding], 60, use_follows=True, tenant=OWNER)
        lease_id = self.cluster.node.lookup(asked).lease_id
        assert lease_id is not None
        return lease_id


Call = Callable[[Stage], object]
"""Makes a call. Returns whether the answer depends on what OWNER has."""


def _storage(name: str, request: Callable[[Stage], object]) -> Callable[[Stage], object]:
    def call(stage: Stage) -> object:
        stub = stage.cluster.nodes(stage.token)
        return getattr(stub, name)(request(stage), timeout=10)

    return call


def _coordinator(name: str, request: Callable[[Stage], object]) -> Callable[[Stage], object]:
    def call(stage: Stage) -> object:
        stub = stage.cluster.coordinators(stage.token)
        return getattr(stub, name)(request(stage), timeout=10)

    return call


def _answers(call: Callable[[Stage], object], tell: Callable[[object], object] = lambda _: True) -> Call:
    return lambda stage: tell(call(stage))


def _chunks(stage: Stage) -> dict[str, object]:
    return {"chunks": [ref(CHUNK)], "tenant": stage.tenant}


def _put(stage: Stage) -> bool:
    (reply,) = stage.cluster.nodes(stage.token).Put(iter(put_steps(CHUNK, stage.tenant)), timeout=10)
    return reply.status == pb.PUT_STATUS_ALREADY_STORED


def _report(stage: Stage) -> bool:
    request = pb.ReportRequest(**_chunks(stage), scores=[0.5])
    stage.cluster.nodes(stage.token).Report(request, timeout=10)
    return bool(stage.heard)


def _unpin(stage: Stage) -> bool:
    request = pb.PinRequest(**_chunks(stage), unpin=True)
    stage.cluster.coordinators(stage.token).Pin(request, timeout=10)
    return not stage.cluster.coordinator.pins(OWNER)


def _forget(stage: Stage) -> bool:
    """Whether OWNER's chunk, pin and canary are gone."""
    cluster = stage.cluster
    request = pb.ForgetTenantRequest(tenant=stage.tenant)
    cluster.coordinators(stage.token).ForgetTenant(request, timeout=10)
    cluster.hear()
    gone = not cluster.node.usage(OWNER)
    assert gone == (not cluster.coordinator.pins(OWNER)) == (not cluster.canaries.get(MODEL, OWNER)[1])
    return gone


def _canary(name: str, model: bytes = MODEL, **fields: object) -> Callable[[Stage], object]:
    request = getattr(pb, f"{name}Request")
    return _coordinator(name, lambda stage: request(model_digest=model, tenant=stage.tenant, **fields))


def _reflection(stage: Stage) -> bool:
    stub = reflection_pb2_grpc.ServerReflectionStub(stage.node)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    return bool(list(stub.ServerReflectionInfo(iter([asked]), timeout=10)))


def _health(stage: Stage) -> bool:
    return bool(health_pb2_grpc.HealthStub(stage.node).Check(health_pb2.HealthCheckRequest()).status)


_READ = pb.ReadRequest(chunks=[ref(CHUNK)], encodings=[CHUNK.encoding], ranges=[pb.ReadRange()])

STORAGE_CALLS: dict[str, Call] = {
    "Lookup": _answers(
        _storage("Lookup", lambda s: pb.LookupRequest(**_chunks(s), encodings=[CHUNK.encoding])),
        lambda reply: reply.answers[0].encoding,
    ),
    "Put": _put,
    "Read": _answers(
        _storage(
            "Read", lambda s: pb.ReadRequest(**_chunks(s), encodings=_READ.encodings, ranges=_READ.ranges)
        ),
        lambda replies: all(reply.status == pb.READ_STATUS_OK for reply in replies),
    ),
    "RenewLease": _answers(
        _storage("RenewLease", lambda s: pb.RenewLeaseRequest(lease_id=s.lease(), lease_ms=1000)),
        lambda reply: reply.renewed,
    ),
    "ReleaseLease": _answers(
        _storage("ReleaseLease", lambda s: pb.ReleaseLeaseRequest(lease_id=s.lease())),
        lambda reply: reply.released,
    ),
    "Use": _answers(
        _storage("Use", lambda s: pb.UseRequest(lease_id=s.lease(), used=b"\1", tokens=256)),
        lambda reply: reply.counted,
    ),
    "Report": _report,
    "Delete": _answers(
        _storage("Delete", lambda s: pb.DeleteRequest(**_chunks(s))), lambda reply: reply.deleted
    ),
    "List": _answers(_storage("List", lambda _: pb.ListRequest()), lambda reply: reply.variants),
    "Verify": _answers(
        _storage("Verify", lambda _: pb.VerifyRequest()), lambda replies: list(replies)[-1].checked
    ),
    "Usage": _answers(_storage("Usage", lambda _: pb.UsageRequest()), lambda reply: reply.tenants),
    "Stats": _answers(_storage("Stats", lambda _: pb.StatsRequest())),
    "Logs": _answers(_storage("Logs", lambda _: pb.LogsRequest())),
    "Throttle": _answers(_storage("Throttle", lambda _: pb.ThrottleRequest(bandwidth_bps=1e9))),
}
COORDINATOR_CALLS: dict[str, Call] = {
    "Membership": _answers(_coordinator("Membership", lambda _: pb.MembershipRequest())),
    "ClusterStats": _answers(_coordinator("ClusterStats", lambda _: pb.ClusterStatsRequest())),
    "Logs": _answers(_coordinator("Logs", lambda _: pb.LogsRequest())),
    "PutCalibration": _answers(_coordinator("PutCalibration", lambda _: iter(()))),
    "GetCalibration": _answers(
        _coordinator("GetCalibration", lambda _: pb.GetCalibrationRequest(digest=bytes(32))), list
    ),
    "FindCalibration": _answers(
        _coordinator("FindCalibration", lambda _: pb.FindCalibrationRequest(model_digest=MODEL))
    ),
    "ListCalibrations": _answers(_coordinator("ListCalibrations", lambda _: pb.ListCalibrationsRequest())),
    "GetCanary": _answers(_canary("GetCanary"), lambda reply: reply.sketch == sketch(1)),
    "PutCanary": _answers(
        _canary("PutCanary", OTHER, sketch=sketch(2, OTHER)), lambda reply: reply.sketch == sketch(1, OTHER)
    ),
    "ReportRefusal": _answers(_canary("ReportRefusal", message="differs")),
    "ReportFetch": _answers(_coordinator("ReportFetch", lambda s: pb.ReportFetchRequest(tenant=s.tenant))),
    "ListModels": _answers(
        _coordinator("ListModels", lambda _: pb.ListModelsRequest()),
        lambda reply: any(model.tenant == OWNER for model in reply.models),
    ),
    "ReplaceCanary": _answers(_canary("ReplaceCanary")),
    "Pin": _unpin,
    "ListPins": _answers(
        _coordinator("ListPins", lambda s: pb.ListPinsRequest(tenant=s.tenant)), lambda reply: reply.chunks
    ),
    "SetQuota": _answers(
        _coordinator("SetQuota", lambda _: pb.SetQuotaRequest(quota=pb.Quota(tenant="new", limit_bytes=1)))
    ),
    "ListQuotas": _answers(
        _coordinator("ListQuotas", lambda _: pb.ListQuotasRequest()),
        lambda reply: any(quota.tenant == OWNER for quota in reply.quotas),
    ),
    "ForgetTenant": _forget,
    "Events": _answers(_coordinator("Events", lambda s: pb.EventsRequest(tenant=s.tenant))),
    "Predict": _answers(
        _coordinator("Predict", lambda s: pb.PredictRequest(**_chunks(s), bandwidth_bps=1)),
        lambda reply: reply.chunks,
    ),
    "Drain": _answers(_coordinator("Drain", lambda _: pb.DrainRequest(node_id="nobody"))),
    "Repair": _answers(_coordinator("Repair", lambda _: pb.RepairRequest())),
}


def _health_watch(stage: Stage) -> bool:
    watch = health_pb2_grpc.HealthStub(stage.node).Watch(health_pb2.HealthCheckRequest(), timeout=10)
    try:
        return bool(next(watch).status)
    finally:
        watch.cancel()


_OTHERS: dict[str, Call] = {
    f"/{REFLECTION}/ServerReflectionInfo": _reflection,
    "/grpc.health.v1.Health/Check": _health,
    "/grpc.health.v1.Health/Watch": _health_watch,
}
CALLS: dict[str, Call] = {
    **{f"/{STORAGE}/{name}": call for name, call in STORAGE_CALLS.items()},
    **{f"/{COORDINATOR}/{name}": call for name, call in COORDINATOR_CALLS.items()},
    **_OTHERS,
}


def outcome(call: Call, stage: Stage) -> str:
    """What the caller gets."""
    stage.prepare()
    try:
        return YES if call(stage) else MISS
    except grpc.RpcError as error:
        if error.code() in _REFUSED:
            stage.said.append(error.details())
            return _REFUSED[error.code()]
        if error.code() not in _SERVED:
            raise
        gone = error.code() is grpc.StatusCode.NOT_FOUND and "canary" in error.details()
        return MISS if gone else YES


def bulk_outcome(request: bytes, stage: Stage) -> str:
    """What the caller gets from the bulk port."""
    stage.prepare()
    with stage.cluster.bulk_connection(stage.token) as connected:
        connected.sendall(request)
        header = unpack_header(bytearray(received(connected, HEADER_BYTES)))
        if header.kind == FrameKind.REFUSED:
            text = received(connected, header.length).decode()
            stage.said.append(text)
            return DENIED if "needs a credential with the scope" in text else NO
        if header.kind == FrameKind.RANGE:
            return YES if header.status == pb.READ_STATUS_OK else MISS
        reply = pb.PutReply.FromString(received(connected, header.length))
        return YES if reply.status == pb.PUT_STATUS_ALREADY_STORED else MISS


_BULK = {"bulk port: READ": read_frame(), "bulk port: PUT": put_frame() + CHUNK.data}


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    cluster = SecuredCluster(folder)
    stage = Stage(cluster)
    catalog = cluster.node._catalog
    applied = catalog.report
    catalog.report = lambda slot, score: (stage.heard.append(score), applied(slot, score))  # type: ignore[method-assign]
    try:
        yield stage
    finally:
        cluster.close()


def stranger(cluster: SecuredCluster, kind: str) -> str:
    """The token of a caller that no call is for."""
    if kind == "none":
        return ""
    token = cluster.token(None, *Scope, lifetime_s=-1 if kind == "expired" else 3600)
    if kind == "wrong":
        return token[:-8] + "00000000"
    if kind == "revoked":
        cluster.revoke(token)
    return token


def results(stage: Stage) -> dict[str, list[str]]:
    """By call: what each of CALLERS gets, and then what strangers get, who must all get the same."""
    cluster = stage.cluster
    tokens = [cluster.token(tenant, scope) for tenant, scope in CALLERS.values()]
    strangers = [stranger(cluster, kind) for kind in STRANGERS]
    names = ["" if tenant is not None else OWNER for tenant, _ in CALLERS.values()]

    def row(ask: Callable[[], str]) -> list[str]:
        cells = []
        for token, name in zip([*tokens, *strangers], [*names, *[""] * len(strangers)], strict=True):
            stage.token, stage.tenant = token, name
            cells.append(ask())
        (same,) = set(cells[len(tokens) :])
        return [*cells[: len(tokens)], same]

    table = {name: row(lambda call=call: outcome(call, stage)) for name, call in CALLS.items()}
    bulk = {name: row(lambda frame=frame: bulk_outcome(frame, stage)) for name, frame in _BULK.items()}
    return table | bulk


def calls_table(found: dict[str, list[str]]) -> str:
    head = ["call", *CALLERS, "no valid credential"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [f"`{name.rpartition('.')[2]}`" if "/" in name else name, *cells] for name, cells in found.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        print(calls_table(results(stage)), end="")


if __name__ == "__main__":
    main()
