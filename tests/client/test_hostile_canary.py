"""Canaries that no honest worker made: they stop reuse at most, and never change what a model runs over."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from transformers import PreTrainedModel

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client import connect
from kvstore_client.canaries import Canaries, KeptCanary
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.probe import probe_for, run_probe
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_codec.canary.compare import ProbeKV
from kvstore_codec.canary.probe import Probe
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model
from tests.client.test_canary import answer, kernel, replace_canary, worker
from tests.cluster.canaries.test_registry import sketch
from tests.codec.canary.test_sketch import sample_kv

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PROMPT = random_prompt(300)
pytestmark = pytest.mark.usefixtures("one_thread")


def put(cluster: ServedCluster, model_digest: bytes, data: bytes) -> None:
    """As a worker that is the first, and computes whatever it likes."""
    with grpc.insecure_channel(cluster.address) as channel:
        request = pb.PutCanaryRequest(model_digest=model_digest, sketch=data)
        rpc.CoordinatorStub(channel).PutCanary(request)


@pytest.mark.parametrize(
    "foreign",
    [lambda own: Probe(1 << 31, own.length), lambda own: Probe(own.vocabulary, 1 << 31)],
    ids=["vocabulary", "length"],
)
def test_a_model_is_run_over_its_own_probe_only(
    cluster: ServedCluster, foreign: Callable[[Probe], Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run_over = tiny_model(), list[Probe]()
    spec, own = spec_of(model), probe_for(model)
    put(cluster, spec.digest, sample_kv(spec).to_bytes(spec, foreign(own)))

    def watched(model: PreTrainedModel, spec: ModelSpec, probe: Probe) -> ProbeKV:
        run_over.append(probe)
        return run_probe(model, spec, probe)

    monkeypatch.setattr("kvstore_client.engines.transformers.canary.run_probe", watched)
    with connect(cluster.address) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        client.store.flush()
        assert set(run_over) == {own}
        assert cached.last_report.bypassed == "canary_differs"
        assert f"it was computed from {foreign(own)}" in str(cached.last_report.why_not)
        cached.close()
    assert cluster.stored_chunks() == 0


def test_a_probe_has_no_token_that_is_not_embedded() -> None:
    model = tiny_model()
    model.config.vocab_size *= 1000
    embedded = model.get_input_embeddings().weight.shape[0]
    assert probe_for(model).token_ids().max() < embedded


def test_what_was_stored_under_a_canary_that_was_pushed_out_meets_no_other(tmp_path: Path) -> None:
    with served_cluster(tmp_path, canary_models=2) as cluster, worker(cluster) as right:
        assert answer(right) == 0
        for number in range(2):
            junk = bytes([number]) * 32
            put(cluster, junk, sketch(0, junk))
        with kernel(), worker(cluster) as wrong:
            assert answer(wrong) == 0  # of what the right one stored
            assert wrong.last_report.bypassed is None
            assert answer(wrong) == 512  # of its own
        assert answer(right) == 512
        with worker(cluster) as next_one:
            assert answer(next_one) == 0
            assert next_one.last_report.bypassed == "canary_differs"


def test_a_canary_that_is_pushed_out_while_it_is_made_is_tried_again(
    cluster: ServedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced between the question and the answer, so that the coordinator does not take it."""
    made = Canaries.get

    def overtaken(canaries: Canaries, spec: ModelSpec) -> KeptCanary:
        kept = made(canaries, spec)
        if kept.generation == 0:
            put(cluster, spec.digest, sample_kv(spec).to_bytes(spec, probe_for(tiny_model())))
            replace_canary(cluster)
        return kept

    monkeypatch.setattr(Canaries, "get", overtaken)
    with worker(cluster, retry_after_s=0.0) as cached:
        assert answer(cached) == 0
        assert cached.canary.refusal(cached.spec, wait_s=30) is None
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.bypassed is None
