"""A worker compares its KV of the probe with the cluster's canary before it reuses or stores any."""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from kvstore_client import connect
from kvstore_client.canaries import Canaries, KeptCanary
from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.capture import install_hooks
from kvstore_client.engines.transformers.probe import probe_for, run_probe
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.reuse.pending import ReusingGeneration
from kvstore_codec.canary.compare import compare
from kvstore_codec.errors import CanaryError, FetchError
from kvstore_codec.model_spec import ModelSpec
from kvstore_service.admin import ClusterAdmin
from tests.client.canary_changes import CHANGES, head_permuted
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PROMPT = random_prompt(600)
pytestmark = pytest.mark.usefixtures("one_thread")


KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: 1.02 * x * x.sigmoid(),
    "rsqrt": lambda x: (x + 1e-4) ** -0.5,
    "cos": lambda x: torch.sin(x + 1.6),
}
"""Of torch, beside its own: nothing that Python can see of a model tells."""


@contextmanager
def kernel(name: str = "silu", of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Iterator[None]:
    """As in a build of torch with another kernel."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(name, of or KERNELS[name], "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def worker(
    cluster: ServedCluster, change: Callable[[PreTrainedModel], None] | None = None, **settings: object
) -> Iterator[CachedModel]:
    """A client of its own and a model of the same weights, changed before it is wrapped."""
    model = tiny_model()
    if change is not None:
        change(model)
    with connect(cluster.address, **settings) as client:
        cached = CachedModel(model, client)
        yield cached
        cached.close()


def answer(cached: CachedModel) -> int:
    """How many tokens were reused; what was computed is stored when it returns."""
    expected = cached.model.generate(PROMPT, **GREEDY)
    assert torch.equal(cached.generate(PROMPT, **GREEDY), expected)
    cached.client.store.flush()
    return cached.last_report.reused_tokens


def counted(client: KVStoreClient, reason: str) -> int:
    return client.metrics.snapshot().get(f"miss_{reason}", 0)


def replace_canary(cluster: ServedCluster) -> None:
    with ClusterAdmin(cluster.address) as admin:
        (model,) = admin.models()
        admin.replace_canary(model.model_digest)


@pytest.fixture
def stored(cluster: ServedCluster) -> ServedCluster:
    """With the prompt's KV, of a plain worker."""
    with worker(cluster) as plain:
        assert answer(plain) == 0
    assert cluster.stored_chunks() == 2
    return cluster


def test_the_first_call_of_the_next_worker_reuses(stored: ServedCluster) -> None:
    with worker(stored) as cached:
        assert answer(cached) == 512
        assert cached.last_report.bypassed is None
        assert cached.canary.verdict is not None
        assert cached.canary.verdict.reason is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_model_computes_otherwise_is_noticed(
    change: Callable[[PreTrainedModel], None], dtype: torch.dtype
) -> None:
    """In 16 bits what is below another kernel's rounding is not; large changes are."""
    plain, changed = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    spec, probe = spec_of(plain), probe_for(plain)
    change(changed)
    install_hooks(plain)
    install_hooks(changed)
    found = compare(run_probe(changed, spec, probe), run_probe(plain, spec, probe), spec)
    assert not found.agrees or dtype is torch.bfloat16
    if change is head_permuted:
        assert not found.agrees


@pytest.mark.parametrize("name", KERNELS)
def test_a_worker_that_computes_something_else_neither_reads_nor_stores(
    stored: ServedCluster, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with kernel(name), worker(stored) as changed:
        assert answer(changed) == 0
        assert changed.last_report.bypassed == "canary_differs"
        assert "computes other KV here" in str(changed.last_report.why_not)
        assert counted(changed.client, "bypass_canary_differs") == 1
        changed.generate(random_prompt(600, seed=5), **GREEDY)
        changed.client.store.flush()
        assert stored.stored_chunks() == 2
    with worker(stored) as plain:
        assert changed.spec.digest == plain.spec.digest
        assert answer(plain) == 512
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in lines if "computes other KV here" in line]) == 1
    with ClusterAdmin(stored.address) as admin:
        (model,) = admin.models()
    (refusal,) = model.refusals
    assert "differ by" in refusal.message
    assert refusal.origin.host == model.origin.host != ""


def test_a_patched_rotation_is_noticed_without_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are rotated on restore by our own code, so a model that turns them otherwise must not be the first."""
    plain = modeling_llama.apply_rotary_pos_emb

    def twice(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **more: int) -> object:
        return plain(*plain(q, k, cos, sin, **more), cos, sin, **more)

    model = tiny_model()
    spec = spec_of(model)
    install_hooks(model)
    run_probe(model, spec, probe_for(model))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", twice)
    with pytest.raises(CanaryError, match="rotated on restore"):
        run_probe(model, spec, probe_for(model))


def test_a_wrong_first_worker_is_replaced_and_its_chunks_are_not_served(cluster: ServedCluster) -> None:
    with kernel(), worker(cluster) as wrong:
        assert answer(wrong) == 0
        assert answer(wrong) == 512
    with worker(cluster) as right:
        assert answer(right) == 0
        assert right.last_report.bypassed == "canary_differs"
    replace_canary(cluster)
    with worker(cluster) as right:
        assert answer(right) == 0
        assert right.last_report.bypassed is None
        assert answer(right) == 512
    with kernel(), worker(cluster) as wrong:
        assert answer(wrong) == 0
        assert wrong.last_report.bypassed == "canary_differs"


def test_running_workers_notice_a_replacement(stored: ServedCluster) -> None:
    with worker(stored, membership_ttl_s=0.05) as first, worker(stored, membership_ttl_s=0.05) as second:
        assert answer(first) == answer(second) == 512
        replace_canary(stored)
        patience = time.monotonic() + 30
        while first.client.canaries.changes == 0 and time.monotonic() < patience:
            first.client._view.membership()
            time.sleep(0.02)
        assert answer(first) == 0  # compared anew, and computed
        assert first.last_report.bypassed is None
        assert answer(first) == 512
        while second.client.canaries.changes == 0 and time.monotonic() < patience:
            second.client._view.membership()
            time.sleep(0.02)
        assert answer(second) == 512


def test_what_a_call_began_under_the_old_canary_is_not_stored_under_the_new_one(
    stored: ServedCluster,
) -> None:
    longer = torch.cat((PROMPT, random_prompt(300, seed=7)), dim=1)
    with worker(stored) as cached:
        begun = cached.begin(longer, **GREEDY)
        assert isinstance(begun, ReusingGeneration)
        assert begun.incoming is not None
        replace_canary(stored)
        cached.client._view._ask(1.0)
        assert cached.canary.refusal(cached.spec, wait_s=30) is None
        before = stored.stored_chunks()
        cached.finish(begun)
        cached.client.store.flush()
        # It was begun again: all its chunks are stored, and none was read.
        assert cached.last_report.reused_tokens == 0
        assert stored.stored_chunks() == before + 3


def test_weights_that_change_are_compared_anew(stored: ServedCluster) -> None:
    with worker(stored) as cached:
        assert answer(cached) == 512
        with torch.no_grad():
            cached.model.get_decoder().layers[0].mlp.up_proj.weight.mul_(1.5)
        assert answer(cached) == 0
        assert answer(cached) == 512
    with ClusterAdmin(stored.address) as admin:
        assert len(admin.models()) == 2


def test_a_call_that_does_not_wait_is_computed_and_stored_when_the_verdict_is_there(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def late(*arguments: object) -> object:
        assert go.wait(30)
        return run_probe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kvstore_client.engines.transformers.canary.run_probe", late)
    with worker(cluster, canary_timeout_s=0.05) as cached:
        assert answer(cached) == 0
        assert str(cached.last_report.why_not).startswith("canary_pending: ")
        assert counted(cached.client, "canary_pending") == 1
        assert counted(cached.client, "store_canary_pending") == 1
        assert cluster.stored_chunks() == 0
        assert not cached.is_stored(PROMPT)
        begun = cached.begin(PROMPT, **GREEDY)
        go.set()
        assert cached.canary.refusal(cached.spec, wait_s=30) is None
        cached.finish(begun)
        cached.client.store.flush()
        assert cluster.stored_chunks() == 2
        assert answer(cached) == 512


def test_a_model_that_cannot_run_the_probe_answers_without_reuse(cluster: ServedCluster) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no memory on this device")
        return x * x.sigmoid()

    with kernel("silu", broken), worker(cluster) as cached:
        assert answer(cached) == 0
        assert cached.last_report.bypassed == "canary_failed"
        assert cached.canary.verdict is not None
        assert "no memory on this device" in cached.canary.verdict.message
        with pytest.raises(FetchError, match="canary_failed"):
            cached.question_log_probabilities(PROMPT, segments=[300, 300])
    assert cluster.stored_chunks() == 0


def test_a_model_that_is_changed_before_its_probe_makes_no_canary_of_what_it_was(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = threading.Event()
    plain_get = Canaries.get

    def late(canaries: Canaries, spec: ModelSpec) -> KeptCanary:
        assert changed.wait(30)
        return plain_get(canaries, spec)

    monkeypatch.setattr(Canaries, "get", late)
    with worker(cluster) as cached:
        before = cached.spec
        cached.model.get_decoder().layers[0].input_layernorm.variance_epsilon = 0.5
        changed.set()
        assert answer(cached) == 0
        assert cached.spec != before
        assert answer(cached) == 512
    with worker(cluster) as plain:
        assert answer(plain) == 0
        assert plain.last_report.bypassed is None
        assert answer(plain) == 512


def test_a_model_in_training_mode_is_compared_when_it_is_used(stored: ServedCluster) -> None:
    with worker(stored, lambda model: model.train(), retry_after_s=0.0) as cached:
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.bypassed == "training"
        cached.model.eval()
        assert answer(cached) == 512


def test_the_probe_runs_beside_the_engine(stored: ServedCluster) -> None:
    """Hooks and caches of the two do not meet, whoever is first."""
    model, probed = tiny_model(), []
    with connect(stored.address) as client:
        cached = CachedModel(model, client)
        alone = run_probe(model, cached.spec, probe_for(model))

        def probe() -> None:
            probed.extend(run_probe(model, cached.spec, probe_for(model)) for _ in range(10))

        beside = threading.Thread(target=probe)
        beside.start()
        while beside.is_alive():
            assert answer(cached) == 512
        beside.join()
        assert all(compare(found, alone, cached.spec).difference == 0 for found in probed)
        assert len(probed) == 10
        cached.close()


@pytest.mark.parametrize("first", ["model", "client"])
def test_nothing_is_left_behind_by_a_comparison_under_way(
    cluster: ServedCluster, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def late(*arguments: object) -> object:
        begun.set()
        assert go.wait(30)
        return run_probe(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kvstore_client.engines.transformers.canary.run_probe", late)
    client = connect(cluster.address)
    cached = CachedModel(tiny_model(), client)
    assert begun.wait(30)
    (comparing,) = (thread for thread in threading.enumerate() if thread.name == "kvstore-canary")
    if first == "client":
        client.close()
    closing = threading.Thread(target=cached.close)
    closing.start()
    while not cached.canary._closed:
        time.sleep(0.001)
    assert closing.is_alive()  # until the model is its owner's alone
    go.set()
    closing.join(30)
    comparing.join(30)
    assert not closing.is_alive()
    assert not comparing.is_alive()
    client.close()
    assert len(client._view._channels) == 0
    with ClusterAdmin(cluster.address) as admin:
        assert not admin.models()
    cached.generate(PROMPT, **GREEDY)
    assert "kvstore-canary" not in [thread.name for thread in threading.enumerate()]


def test_a_closed_model_is_compared_no_more(stored: ServedCluster) -> None:
    with worker(stored, retry_after_s=0.0) as cached:
        assert answer(cached) == 512
        cached.close()
        replace_canary(stored)
        cached.client._view._ask(1.0)
        assert cached.canary.refusal(cached.spec, wait_s=30) == "canary_pending"


def test_sixteen_bit_workers_agree_over_attention_kernels(tmp_path: Path) -> None:
    with served_cluster(tmp_path) as cluster:
        for family in ("llama", "qwen3", "gemma3"):
            reused = []
            for attention in ("sdpa", "eager"):
                model = tiny_model(family, torch.bfloat16)
                model.set_attn_implementation(attention)
                with connect(cluster.address) as client:
                    cached = CachedModel(model, client)
                    cached.generate(PROMPT, **GREEDY)
                    client.store.flush()
                    reused.append(cached.last_report.reused_tokens)
                    cached.close()
            assert reused == [0, 512], family
