"""Whether a loaded model computes what the cluster's KV of it was computed with: found out in the background."""

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
    """Compares a model with the canary of its `spec`, which every method is told. Thread-safe.

    A comparison runs in a thread of its own, which ends with it: one prefill of 256 tokens the first time, an exchange
    with the coordinator when a canary was replaced. A probe during which the model was not, by its `identity`, what
    `spec` describes says nothing.
    """

    def __init__(self, model: PreTrainedModel, client: KVStoreClient, identity: ModelIdentity) -> None:
        self._model, self._client, self._identity = model, client, identity
        self._lock = threading.Lock()
        self._probing = threading.Lock()
        """Held while the model runs over the probe."""
        self._closed = False
        self._spec: ModelSpec | None = None
        self._own: tuple[Probe, ProbeKV] | None = None
        self._verdict: Verdict | None = None
        self._running: threading.Event | None = None
        """Set when the comparison under way has ended."""
        self._began_s = 0.0
        self._spent_s = 0.0
        """What comparisons of the spec that ended took together."""
        renew_in_children(self, ModelCanary._renew)

    @property
    def verdict(self) -> Verdict | None:
        """Of the latest comparison; its message is for a person."""
        with self._lock:
            return self._verdict

    def why(self, reason: str) -> str:
        """A refusal's word and sentence."""
        verdict = self.verdict
        if verdict is not None and verdict.reason == reason:
            return f"{reason}: {verdict.message}"
        return f"{reason}: this model's KV is not compared yet with the canary that the cluster keeps of it"

    def count(self, reason: str, *, storing: bool = False) -> str:
        """Count, and log, that a call looks nothing up for `reason`, or does not store what it computed. Returns
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
        """The model is this one from now on: forget what was found of another, and start to compare."""
        with self._lock:
            self._spec, self._own, self._verdict, self._running = spec, None, None, None
            self._spent_s = 0.0
        self.refusal(spec, wait_s=0)

    def refusal(self, spec: ModelSpec, *, wait_s: float) -> str | None:
        """Why KV must be neither reused nor stored now, in one word; None when it may be. A client that is closed
        neither reads nor stores anyway: None.

        A comparison under way is waited for, unless it repeats one that failed: then calls go on without it. All
        comparisons of a spec together are waited for `wait_s` at most."""
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
        """Compare no more: when this returns nothing runs the model any more, and nothing of it becomes a canary. Waits
        for a probe that is being computed, which takes a prefill of 256 tokens."""
        with self._lock:
            self._closed = True
        with self._probing:
            pass

    def _renew(self) -> None:
        """In a forked child, which has not the parent's thread. What the model computes is known still."""
        self._lock, self._probing = threading.Lock(), threading.Lock()
        self._verdict = self._running = None
        self._spent_s = 0.0

    def _is_stale(self, spec: ModelSpec, verdict: Verdict) -> bool:
        """Whether it is to be found out anew."""
        if verdict.reason in (*FAILED, "canary_pending"):
            return not self._client.canaries.is_paused(spec)
        return verdict.changes != self._client.canaries.changes

    def _start(self, spec: ModelSpec) -> threading.Event | None:
        """Called with the lock. None after `close`, and when there is no thread left in this process."""
        if self._closed:
            return None
        ended = threading.Event()
        # Not a daemon: the interpreter must not end while a thread is inside torch. It lasts seconds at most.
        thread = threading.Thread(target=self._run, args=(spec, ended), name="kvstore-canary")
        try:
            thread.start()
        except RuntimeError:
            return None
        self._running, self._began_s = ended, time.monotonic()
        return ended

    @single_threaded()
    def _run(self, spec: ModelSpec, ended: threading.Event) -> None:
        verdict = Verdict("canary_failed", "an error of kvstore; see the log")
        try:
            verdict = self._found(spec)
        except NodeUnavailableError as error:
            verdict = Verdict("unreachable", str(error))
        except _NothingFoundError as error:
            verdict = Verdict("canary_pending", str(error))
        except Exception as error:  # whatever the model raises is not the engine's to see from here
            verdict = Verdict("canary_failed", f"{spec.model_id} cannot compute the probe: {error!r}"[:1000])
        finally:
            with self._lock:
                if self._running is ended:
                    self._spent_s += time.monotonic() - self._began_s
                    self._verdict, self._running = verdict, None
                    self._say(spec, verdict)
            ended.set()

    def _found(self, spec: ModelSpec) -> Verdict:
        kept = self._client.canaries.get(spec)
        probe, own = self._computed(spec)
        self._require_open()
        return self._client.canaries.compared(spec, kept, probe, own, self._model.device.type)

    def _computed(self, spec: ModelSpec) -> tuple[Probe, ProbeKV]:
        """The model's own probe, whatever a kept canary says it was made of, and its KV."""
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
            raise _NothingFoundError("the model or its client was closed before the comparison ended")

    def _require_unchanged(self, spec: ModelSpec) -> None:
        described = self._identity.current(every_row=True)
        if described.spec != spec or described.refusal is not None:
            raise _NothingFoundError("the model was changed while it computed the probe")
        if self._model.training:
            raise _NothingFoundError("the model is in training mode")

    def _say(self, spec: ModelSpec, verdict: Verdict) -> None:
        """Called with the lock."""
        self._client.canaries.note(spec, verdict)
        if verdict.reason is None:
            log.info("%s", verdict.message)
        elif verdict.reason in FINAL:
            self._client.metrics.failures.warn(f"{verdict.reason} {verdict.message}", verdict.message)


class _NothingFoundError(CanaryError):
    """The comparison says nothing, and is to be made again if the model is still used."""
