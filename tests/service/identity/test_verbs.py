"""The table of what each call needs, against the calls that there are."""

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.identity import Scope
from kvstore_service.identity.verbs import COORDINATOR, HEALTH, REFLECTION, STORAGE, VERBS, is_open


def test_each_call_has_a_rule() -> None:
    services = [
        *pb.DESCRIPTOR.services_by_name.values(),
        *reflection_pb2.DESCRIPTOR.services_by_name.values(),
        *health_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    calls = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    missing = "/grpc.health.v1.Health/List"  # which the package does not implement
    assert VERBS.keys() == {call for call in calls if not is_open(call)} - {missing}
    assert {service.full_name for service in services} == {STORAGE, COORDINATOR, REFLECTION, HEALTH}


def test_only_the_check_of_health_is_open() -> None:
    assert is_open("/grpc.health.v1.Health/Check")
    assert not is_open("/grpc.health.v1.Health/Watch")
    assert not any(map(is_open, VERBS))
    assert not is_open("/grpc.health.v1.Healthy/Check")


def test_a_worker_may_not_operate_and_a_node_may_only_copy_and_drain() -> None:
    may = {scope: {verb.name for verb in VERBS.values() if scope in verb.scopes} for scope in Scope}
    operates = {
        "Verify", "Usage", "ForgetTenant", "Throttle", "Drain", "Repair", "SetQuota", "Pin", "PutCalibration",
        "ReplaceCanary",
    }  # fmt: skip
    of_everybody = {"ServerReflectionInfo", "Watch"}
    assert not may[Scope.DATA] & operates
    assert operates <= may[Scope.ADMIN]
    assert may[Scope.NODE] == {
        "Lookup", "Put", "Stats", "Logs", "Membership", "ClusterStats", "ListModels", "ListCalibrations", "Drain",
        *of_everybody,
    }  # fmt: skip
    assert may[Scope.METRICS] == {"Stats", "ClusterStats", *of_everybody}


def test_what_concerns_every_tenant_needs_a_credential_for_every_tenant() -> None:
    assert {verb.name for verb in VERBS.values() if verb.every_tenant} == {
        "Stats", "Logs", "Throttle", "ClusterStats", "PutCalibration", "SetQuota", "Drain", "Repair"
    }  # fmt: skip
