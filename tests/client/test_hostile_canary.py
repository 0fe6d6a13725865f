"""Canaries that no honest worker made: they stop reuse at most, and never change what a model runs over."""

from collections.abc import Callable

import grpc
import pytest
import torch
from transformers import PreTrainedModel

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.probe import probe_for, run_probe
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_codec.canary.compare import ProbeKV
from kvstore_codec.canary.probe import Probe
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model
from tests.codec.canary.test_sketch import sample_kv

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PROMPT = random_prompt(300)
pytestmark = pytest.mark.usefixtures("one_thread")


def put(cluster: ServedCluster, spec: ModelSpec, sketch: bytes) -> None:
    """As a worker that is the first, and computes whatever it likes."""
    with grpc.insecure_channel(cluster.address) as channel:
        request = pb.PutCanaryRequest(model_digest=spec.digest, sketch=sketch)
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
    put(cluster, spec, sample_kv(spec).to_bytes(spec, foreign(own)))

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
        assert f"it was made of {foreign(own)}" in str(cached.last_report.why_not)
        cached.close()
    assert cluster.stored_chunks() == 0


def test_a_probe_has_no_token_that_is_not_embedded() -> None:
    model = tiny_model()
    model.config.vocab_size *= 1000
    embedded = model.get_input_embeddings().weight.shape[0]
    assert probe_for(model).token_ids().max() < embedded
