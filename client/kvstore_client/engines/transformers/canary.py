"""Checks in the background whether a loaded model computes the same KV as the model's canary in the cluster."""

import logging
import threading
import time

from transformers import PreTrainedModel

from kvstore_client.canaries import FAILED, FINAL, Verdict
from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers.identity.guard import ModelIdentity
from kvstore_client.engines.transformers.probe import probe_for, run_probe
from kvstore_client.fork import renew_in_children
from kvstore_client.grpc_failure import unreachable
from kvstore_client.miss_reason import MissReason
from kvstore_client.threads import single_threaded
from kvstore_codec.canary.compare import ProbeKV
from kvstore_codec.canary.probe import Probe
from kvstore_codec.errors import CanaryError, NodeUnavailableError
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


class ModelCanary:
    """Compares a model with the canary of its `spec`, which every method takes. Thread-safe.

    Each comparison runs in a thread of its own: a prefill of 256 tokens the first time, and one exchange with the
    coordinator when a canary was replaced. A comparison gives no verdict when the model's `identity` did not match
    `spec` all the time.
    """

    def __init__(self, model: PreTrainedModel, client: KVStoreClient, identity: ModelIdentity) -> None:
        self._model, self._client, self._identity = model, client, identity
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        """Held while the model computes the probe."""
        self._closed = False
        self._spec: ModelSpec | None = None
        self._own: tuple[Probe, ProbeKV] | None = None
        self._verdict: Verdict | None = None
        self._running: threading.Event | None = None
        """Event of the comparison in progress; set when it ends."""
        self._began_s = 0.0
        self._spent_s = 0.0
        """Total duration of the finished comparisons of this spec, seconds."""
        renew_in_children(self, ModelCanary._renew)

    @property
    def verdict(self) -> Verdict | None:
        """The latest verdict; its message is for people."""
        with self._lock:
            return self._verdict

    def why(self, reason: str) -> str:
        """The refusal's one-word reason followed by a sentence."""
        verdict = self.verdict
        if verdict is not None and verdict.reason == reason:
            return f"{reason}: {verdict.message}"
        return f"{reason}: this model's KV has not been compared with the cluster's canary yet"

    def count_refusal(self, reason: str, *, storing: bool = False) -> str:
        """Count and log that a call, for `reason`, looks nothing up, or with `storing` stores nothing. Return
        `why`."""
        why, metrics = self.why(reason), self._client.metrics
        counted = MissReason.of_canary(reason, storing=storing)
        if reason == "unreachable":
            told = why.removeprefix("unreachable: ")
            detail = unreachable(NodeUnavailableError(told), self._client.settings.address)
            metrics.missed(counted, detail=detail, cause=told)
        else:
            metrics.missed(counted, detail=f"{why}; KV is computed, and not shared", cause=reason)
        return why

    def watch(self, spec: ModelSpec) -> None:
        """Set the model's spec: drop the verdict of another spec, and start to compare."""
        with self._lock:
            self._spec, self._own, self._verdict, self._running = spec, None, None, None
            self._spent_s = 0.0
        self.refusal(spec, wait_s=0)

    def refusal(self, spec: ModelSpec, *, wait_s: float) -> str | None:
        """Why KV must not be reused or stored now, in one word; None when it may be. Also None for a closed client,
        which neither reads nor stores.

        Waits for a comparison in progress, unless it repeats a failed one: calls then run without waiting. All
        comparisons of a spec together delay calls by `wait_s` at most.
        """
        while not self._client.is_closed:
            with self._lock:
                verdict, running = self._verdict, self._running
                if verdict is not None and not self._is_stale(spec, verdict):
                    return verdict.reason
                if running is None:
                    running = self._start(spec)
                left_s = wait_s - self._spent_s - (time.monotonic() - self._began_s)
                if verdict is not None and verdict.reason in FAILED:
                    left_s = 0.0
            if running is None or not running.wait(max(0.0, left_s)):
                return (verdict.reason if verdict is not None else None) or "canary_pending"
            with self._lock:
                if self._verdict is not None and self._running is None:
                    return self._verdict.reason
        return None

    def close(self) -> None:
        """Stop comparing. Blocks until a probe in progress ends, which takes a prefill of 256 tokens; afterwards
        nothing runs the model or creates a canary."""
        with self._lock:
            self._closed = True
        with self._probing:
            pass

    def _renew(self) -> None:
        """Reset in a forked child, which does not have the parent's thread. The verdict stays valid."""
        self._lock, self._probing = threading.Lock(), threading.Lock()
        self._verdict = self._running = None
        self._spent_s = 0.0

    def _is_stale(self, spec: ModelSpec, verdict: Verdict) -> bool:
        """Whether the model must be compared again."""
        if verdict.reason in (*FAILED, "canary_pending"):
            return not self._client.canaries.is_paused(spec)
        return verdict.changes != self._client.canaries.changes

    def _start(self, spec: ModelSpec) -> threading.Event | None:
        """Start a comparison; the caller holds the lock. None after `close`, and when no thread can be started."""
        if self._closed:
            return None
        ended = threading.Event()
        # Not a daemon: the interpreter must not exit while a thread is inside torch. The thread lives for seconds at
        # most.
        thread = threading.Thread(target=self._run, args=(spec, ended), name="kvstore-canary")
        try:
            thread.start()
        except RuntimeError:
            return None
        self._running, self._began_s = ended, time.monotonic()
        return ended

    @single_threaded()
    def _run(self, spec: ModelSpec, ended: threading.Event) -> None:
        verdict = Verdict("canary_failed", "an internal error of kvstore; see the log")
        try:
            verdict = self._compare(spec)
        except NodeUnavailableError as error:
            verdict = Verdict("unreachable", str(error))
        except _NoVerdictError as error:
            verdict = Verdict("canary_pending", str(error))
        except Exception as error:  # an error of the model must not reach the engine here
            verdict = Verdict("canary_failed", f"{spec.model_id} cannot compute the probe: {error!r}"[:1000])
        finally:
            with self._lock:
                if self._running is ended:
                    self._spent_s += time.monotonic() - self._began_s
                    self._verdict, self._running = verdict, None
                    self._log_verdict(spec, verdict)
            ended.set()

    def _compare(self, spec: ModelSpec) -> Verdict:
        kept = self._client.canaries.get(spec)
        probe, own = self._computed(spec)
        self._require_open()
        return self._client.canaries.compared(spec, kept, probe, own, self._model.device.type)

    def _computed(self, spec: ModelSpec) -> tuple[Probe, ProbeKV]:
        """The probe for this model, whatever the kept canary was made of, and the model's KV of it."""
        probe = probe_for(self._model)
        with self._lock:
            known = self._own
        if known is not None and known[0] == probe:
            return known
        with self._probing:
            self._require_open()
            self._require_unchanged(spec)
            own = run_probe(self._model, spec, probe)
            self._require_unchanged(spec)
        with self._lock:
            if self._spec is spec:
                self._own = probe, own
        return probe, own

    def _require_open(self) -> None:
        if self._closed or self._client.is_closed:
            raise _NoVerdictError("the model or its client was closed before the comparison ended")

    def _require_unchanged(self, spec: ModelSpec) -> None:
        described = self._identity.current(every_row=True)
        if described.spec != spec or described.refusal is not None:
            raise _NoVerdictError("the model was changed while it computed the probe")
        if self._model.training:
            raise _NoVerdictError("the model is in training mode")

    def _log_verdict(self, spec: ModelSpec, verdict: Verdict) -> None:
        """Log a verdict; the caller holds the lock."""
        self._client.canaries.note(spec, verdict)
        if verdict.reason is None:
            log.info("%s", verdict.message)
        elif verdict.reason in FINAL:
            self._client.metrics.failures.warn(f"{verdict.reason} {verdict.message}", verdict.message)


class _NoVerdictError(CanaryError):
    """A comparison without a verdict, to be repeated while the model is used."""
