"""Whether this engine computes the same KV as the cluster's other vLLM workers of the model.

A connector cannot make the engine compute anything. So the canary's probe is an ordinary request: its tokens are fixed,
anybody may send it (`kvstore_client.engines.vllm.probe`), and it is never loaded. When the engine has computed it, the
worker compares its KV with the canary that the cluster keeps, as docs/canary.md says.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from kvstore_client.canaries import FAILED, FINAL, Verdict
from kvstore_client.client import KVStoreClient
from kvstore_client.threads import single_threaded
from kvstore_codec.canary.compare import ProbeKV
from kvstore_codec.canary.probe import TOKENS, Probe, Sample
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)

ReadLayer = Callable[[int, Sequence[int], int], tuple[torch.Tensor, torch.Tensor]]
"""Copies of a layer's keys and values from blocks: that many tokens, `[kv_heads, tokens, head_dim]` each."""


def engine_probe(vocabulary: int) -> Probe:
    """The probe for an engine, which computes tokens at the positions from 0 on only."""
    return Probe.reaching(vocabulary, TOKENS)


class EngineCanary:
    """Compares the KV of one worker. Its methods are called by the worker's thread and wait for nothing; comparisons
    run in a thread of their own."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        probe: Probe,
        read_layer: ReadLayer,
        *,
        device: str,
        is_required: bool,
    ) -> None:
        """`spec` names KV with keys as the engine keeps them. `device` is the type of device that computes it.
        `is_required`: whether KV is neither read nor stored before the engine was compared."""
        self._client, self._spec, self._probe, self._read_layer = client, spec, probe, read_layer
        self._device, self._is_required = device, is_required
        self._lock = threading.Lock()
        self._own: ProbeKV | None = None
        self._verdict: Verdict | None = None
        self._is_running = False

    @torch.inference_mode()
    def computed(self, block_ids: Sequence[int]) -> None:
        """The engine has computed the probe into these blocks. Copies its KV, and compares it."""
        sample = Sample.of(self._spec)
        chosen = torch.tensor(sample.tokens, dtype=torch.int64, device="cpu")
        layers = [self._read_layer(layer, block_ids, TOKENS) for layer in sample.layers]
        keys, values = (torch.stack([layer[half].cpu()[:, chosen] for layer in layers]) for half in (0, 1))
        with self._lock:
            self._own, self._verdict = ProbeKV(keys, values), None
        self._compare_again()

    def refusal(self, generation: int | None) -> str | None:
        """Why KV must not be read or stored now, in one word; None when it may be. `generation` is that of the canary
        which the names of chunks depend on; None: they depend on another one than this engine is compared with."""
        with self._lock:
            verdict, is_compared = self._verdict, self._own is not None
        if not is_compared:
            return "canary_pending" if self._is_required else None
        if verdict is None or self._is_stale(verdict):
            self._compare_again()
            return "canary_pending"
        is_replaced = generation not in (None, verdict.generation)
        return verdict.reason or ("canary_pending" if is_replaced else None)

    def why(self, reason: str) -> str:
        """A sentence for people."""
        with self._lock:
            verdict = self._verdict
        if verdict is not None and verdict.reason == reason:
            return verdict.message
        return "this engine's KV has not been compared with the cluster's canary yet; send it the probe"

    def _is_stale(self, verdict: Verdict) -> bool:
        if verdict.reason in (*FAILED, "canary_pending"):
            return not self._client.canaries.is_paused(self._spec)
        return verdict.changes != self._client.canaries.changes

    def _compare_again(self) -> None:
        with self._lock:
            if self._is_running or self._client.is_closed:
                return
            # A daemon: it only waits for the coordinator, and an engine that shuts down must not.
            thread = threading.Thread(target=self._run, name="kvstore-canary", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread left; tried again at the next step
                return
            self._is_running = True

    @single_threaded()
    def _run(self) -> None:
        verdict = Verdict("canary_failed", "an internal error of kvstore; see the log")
        with self._lock:
            own = self._own
        try:
            if own is not None:
                canaries = self._client.canaries
                kept = canaries.get(self._spec)
                verdict = canaries.compared(self._spec, kept, self._probe, own, self._device)
        except NodeUnavailableError as error:
            verdict = Verdict("unreachable", str(error))
        except Exception as error:
            log.exception("the engine's KV could not be compared with the canary")
            verdict = Verdict("canary_failed", f"{self._spec.model_id} cannot be compared: {error!r}"[:1000])
        finally:
            with self._lock:
                if self._own is own:
                    self._verdict = verdict
                self._is_running = False
            self._note(verdict)

    def _note(self, verdict: Verdict) -> None:
        self._client.canaries.note(self._spec, verdict)
        if verdict.reason is None:
            log.info("%s", verdict.message)
        elif verdict.reason in FINAL:
            self._client.metrics.failures.warn(f"{verdict.reason} {verdict.message}", verdict.message)
