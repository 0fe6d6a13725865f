"""Reuse through a real service is bit-equal to KV kept in memory, for every family and dtype."""

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.conftest import ServedCluster
from tests.client.models import FAMILIES, random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


def in_memory_answer(
    model: PreTrainedModel, first: torch.Tensor, second: torch.Tensor, keep: int
) -> DynamicCache:
    """The cache after `first` was prefilled, cut to `keep` tokens: KV kept in memory."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(first, past_key_values=cache)
    cache.crop(keep - first.shape[1])
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_worker_gets_the_same_bits(cluster: ServedCluster, family: str, dtype: torch.dtype) -> None:
    document, question = random_prompt(530, seed=1), random_prompt(30, seed=2)
    writer = tiny_model(family, dtype)
    with connect(cluster.address) as client:
        cached = CachedModel(writer, client)
        cached.generate(document, max_new_tokens=1, do_sample=False)
        client.store.flush()
        cached.close()
    assert cluster.stored_chunks() == 2

    reader = tiny_model(family, dtype)
    prompt = torch.cat([document, question], 1)
    kept = in_memory_answer(reader, document, prompt, keep=512)
    expected_cache = (
        [layer.keys.clone() for layer in kept.layers],
        [layer.values.clone() for layer in kept.layers],
    )
    expected = reader.generate(prompt, past_key_values=kept, **GREEDY)
    with connect(cluster.address) as client:
        cached = CachedModel(reader, client)
        got = cached.generate(prompt, return_dict_in_generate=True, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        assert torch.equal(got.sequences, expected)
        for layer, keys, values in zip(got.past_key_values.layers, *expected_cache, strict=True):
            first = (
                layer.get_seq_length() - layer.keys.shape[2]
            )  # layers with a window keep their last window
            assert first < 512
            assert torch.equal(layer.keys[:, :, : 512 - first], keys[:, :, first:])
            assert torch.equal(layer.values[:, :, : 512 - first], values[:, :, first:])
        cached.close()
    cluster.check_nothing_is_held()


@pytest.mark.parametrize("tokens", [255, 256, 257, 511, 512, 513, 1000])
def test_any_prompt_length_is_reused_up_to_its_last_full_chunk(
    cluster: ServedCluster, client: KVStoreClient, tokens: int
) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    prompt = random_prompt(tokens, seed=tokens)
    cold = cached.generate(prompt, **GREEDY)
    assert torch.equal(cold, model.generate(prompt, **GREEDY))
    client.store.flush()
    warm = cached.generate(prompt, **GREEDY)
    assert torch.equal(warm, cold)
    assert cached.last_report.reused_tokens == min(tokens // 256 * 256, tokens - 1)
    cluster.check_nothing_is_held()


def test_two_questions_share_one_document(cluster: ServedCluster, client: KVStoreClient) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    document = random_prompt(600, seed=3)
    for seed in (4, 5):
        prompt = torch.cat([document, random_prompt(40, seed=seed)], 1)
        assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        client.store.flush()
    assert cached.last_report.reused_tokens == 512
    assert cluster.stored_chunks() == 2


def test_a_conversation_that_grows_equals_one_kept_in_memory(client: KVStoreClient) -> None:
    model, cached_model = tiny_model(), tiny_model()
    kept, conversation = DynamicCache(), random_prompt(300, seed=6)
    mine = conversation
    reused = []
    for turn in range(4):
        conversation = model.generate(conversation, past_key_values=kept, max_new_tokens=100, do_sample=False)
        worker = CachedModel(cached_model, client)  # each turn on another worker
        mine = worker.generate(mine, max_new_tokens=100, do_sample=False)
        client.store.flush()
        worker.close()
        reused.append(worker.last_report.reused_tokens)
        assert torch.equal(mine, conversation)
        question = random_prompt(90, seed=10 + turn)
        conversation, mine = (torch.cat([text, question], 1) for text in (conversation, mine))
    assert reused == [0, 256, 512, 768]


def test_chunks_on_several_nodes_are_reused_together(two_node_cluster: ServedCluster) -> None:
    model = tiny_model()
    prompt = random_prompt(256 * 8 + 10, seed=7)
    with connect(two_node_cluster.address) as client:
        cached = CachedModel(model, client)
        cold = cached.generate(prompt, **GREEDY)
        client.store.flush()
        assert all(node.stats().chunks > 0 for node in two_node_cluster.nodes)
        assert torch.equal(cached.generate(prompt, **GREEDY), cold)
        assert cached.last_report.reused_tokens == 2048
    two_node_cluster.check_nothing_is_held()


def test_other_tenants_and_other_weights_never_match(cluster: ServedCluster, client: KVStoreClient) -> None:
    prompt = random_prompt(600, seed=8)
    owner = CachedModel(tiny_model(), client)
    owner.generate(prompt, **GREEDY)
    client.store.flush()
    other_weights = CachedModel(tiny_model(seed=1), client)
    other_weights.generate(prompt, **GREEDY)
    assert other_weights.last_report.reused_tokens == 0
    other_dtype = CachedModel(tiny_model(dtype=torch.bfloat16), client)
    other_dtype.generate(prompt, **GREEDY)
    assert other_dtype.last_report.reused_tokens == 0
    with connect(cluster.address, tenant_salt="another tenant") as stranger:
        foreign = CachedModel(tiny_model(), stranger, store=False)
        foreign.generate(prompt, **GREEDY)
        assert foreign.last_report.reused_tokens == 0
    owner.generate(prompt, **GREEDY)
    assert owner.last_report.reused_tokens == 512


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 2}, "mode_beam_search"),
        ({"attention_mask": torch.cat([torch.zeros(1, 3), torch.ones(1, 597)], 1).long()}, "attention_mask"),
        ({"output_attentions": True}, "argument_output_attentions"),
        ({"prompt_lookup_num_tokens": 3}, "mode_assisted_generation"),
        ({"past_key_values": None}, "argument_past_key_values"),
    ],
)
def test_calls_that_reuse_might_change_run_without_it(
    client: KVStoreClient, arguments: dict[str, object], reason: str
) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    prompt = random_prompt(600, seed=9)
    cached.generate(prompt, **GREEDY)
    client.store.flush()
    got = cached.generate(prompt, **GREEDY, **arguments)
    assert cached.last_report.bypassed == reason
    assert torch.equal(got, model.generate(prompt, **GREEDY, **arguments))
    batch = torch.cat([prompt, prompt])
    assert torch.equal(cached.generate(batch, **GREEDY), model.generate(batch, **GREEDY))
    assert cached.last_report.bypassed == "batch"


def test_sampling_with_a_seed_gives_the_same_text(client: KVStoreClient) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    prompt = random_prompt(600, seed=11)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 12}
    torch.manual_seed(1)
    cold = cached.generate(prompt, **sampling)
    client.store.flush()
    torch.manual_seed(1)
    assert torch.equal(cached.generate(prompt, **sampling), cold)
    assert cached.last_report.reused_tokens == 512


@pytest.mark.parametrize("encoding", ["exact-raw", "high-zstd", "high-hevc-cpu"])
def test_every_encoding_travels(cluster: ServedCluster, encoding: str) -> None:
    model, prompt = tiny_model(), random_prompt(600, seed=12)
    with connect(cluster.address, encoding=encoding, accept=(encoding,)) as client:
        cached = CachedModel(model, client)
        original = cached.generate(prompt, return_dict_in_generate=True, **GREEDY).past_key_values
        client.store.flush()
        restored = cached.generate(prompt, return_dict_in_generate=True, **GREEDY).past_key_values
        assert cached.last_report.reused_tokens == 512
    for before, after in zip(original.layers, restored.layers, strict=True):
        for name in ("keys", "values"):
            exact, reused = (getattr(layer, name)[:, :, :512] for layer in (before, after))
            error = (exact - reused).square().mean() / exact.var()
            assert error < 0.01
            assert (error == 0) == encoding.startswith("exact")


def test_a_lossy_chunk_is_not_used_unless_accepted(cluster: ServedCluster) -> None:
    model, prompt = tiny_model(), random_prompt(600, seed=13)
    with connect(cluster.address, encoding="high-zstd") as writer:
        CachedModel(model, writer).generate(prompt, **GREEDY)
        writer.store.flush()
    with connect(cluster.address) as client:
        cached = CachedModel(model, client)
        cached.generate(prompt, **GREEDY)
        assert cached.last_report.reused_tokens == 0


def test_what_is_computed_behind_lossy_kv_is_not_stored_as_exact(cluster: ServedCluster) -> None:
    model, prompt = tiny_model(), random_prompt(1100, seed=15)
    with connect(cluster.address, encoding="low-zstd") as writer:
        CachedModel(model, writer).generate(prompt[:, :600], **GREEDY)
        writer.store.flush()
    for encoding, stored in (("exact-zstd", 0), ("high-zstd", 0), ("low-zstd", 2)):
        with connect(cluster.address, encoding=encoding, accept=("low-zstd",)) as reader:
            before = cluster.stored_chunks()
            cached = CachedModel(model, reader)
            cached.generate(prompt, **GREEDY)
            assert cached.last_report.reused_tokens == 512
            reader.store.flush()
            assert cluster.stored_chunks() - before == stored


def test_generate_may_be_called_like_the_models_own(client: KVStoreClient) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    prompt = random_prompt(600, seed=14)
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    expected = model.generate(prompt, config)
    for reused, call in enumerate(
        (
            lambda: cached.generate(prompt, config),
            lambda: cached.generate(inputs=prompt, generation_config=config),
            lambda: cached.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY | {"max_new_tokens": 4}
            ),
        )
    ):
        assert torch.equal(call(), expected)
        assert cached.last_report.reused_tokens == (512 if reused else 0)
        client.store.flush()
    beams = GenerationConfig(max_new_tokens=4, do_sample=False, num_beams=2)
    assert torch.equal(cached.generate(prompt, beams), model.generate(prompt, beams))
    assert cached.last_report.bypassed == "mode_beam_search"
    embedded = model.get_input_embeddings()(prompt)
    assert torch.equal(
        cached.generate(inputs_embeds=embedded, **GREEDY), model.generate(inputs_embeds=embedded, **GREEDY)
    )


def test_weights_that_change_after_wrapping_change_the_names(client: KVStoreClient) -> None:
    model = tiny_model()
    cached = CachedModel(model, client)
    prompt = random_prompt(600, seed=15)
    cached.generate(prompt, **GREEDY)
    client.store.flush()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    for reused in (0, 512):
        assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        assert cached.last_report.reused_tokens == reused
        client.store.flush()
    model.to(torch.bfloat16)
    for reused in (0, 512):
        cached.generate(prompt, **GREEDY)
        assert cached.last_report.reused_tokens == reused
        client.store.flush()
    model.train()
    cached.generate(prompt, **GREEDY)
    assert cached.last_report.bypassed == "training"


def poisoned_reader(cluster: ServedCluster, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What a fresh worker answers with and without the service, and how much it reused."""
    model = tiny_model()
    with connect(cluster.address) as client:
        cached = CachedModel(model, client, store=False)
        answer = cached.generate(prompt, **GREEDY)
        return answer, model.generate(prompt, **GREEDY), cached.last_report.reused_tokens


def test_a_model_asked_by_a_logits_processor_poisons_nothing(
    cluster: ServedCluster, client: KVStoreClient
) -> None:
    model = tiny_model()
    CachedModel(model, client)  # dropped without close: its hooks stay
    cached = CachedModel(model, client)
    asking = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    prompt = random_prompt(300, seed=16)
    text = cached.generate(prompt, logits_processor=[asking], do_sample=False, max_new_tokens=260)
    client.store.flush()
    assert cluster.stored_chunks() == 2
    prompt = torch.cat([text[:, :512], random_prompt(20, seed=17)], 1)
    answer, expected, reused = poisoned_reader(cluster, prompt)
    assert reused == 512
    assert torch.equal(answer, expected)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"use_cache": False}, "argument_use_cache"),
        ({"num_beams": 3}, "mode_beam_search"),
        ({"guidance_scale": 1.5}, "argument_guidance_scale"),
        ({"pad_token_id": 7, "eos_token_id": 3}, "attention_mask"),
    ],
)
def test_the_models_own_generation_config_counts_too(
    client: KVStoreClient, own: dict[str, object], reason: str
) -> None:
    model = tiny_model()
    model.generation_config.update(**own)
    cached = CachedModel(model, client)
    prompt = torch.cat([torch.full((1, 20), 7), random_prompt(500, seed=18)], 1)
    config = GenerationConfig(do_sample=False, max_new_tokens=6)
    assert torch.equal(cached.generate(prompt, config), model.generate(prompt, config))
    assert cached.last_report.bypassed == reason


def test_masks_of_other_numbers_and_autocast_run_without_reuse(client: KVStoreClient) -> None:
    cached = CachedModel(tiny_model(), client)
    prompt = random_prompt(300, seed=19)
    cached.generate(prompt, attention_mask=2 * torch.ones_like(prompt), **GREEDY)
    assert cached.last_report.bypassed == "attention_mask"
    with torch.autocast("cpu", torch.bfloat16):
        cached.generate(prompt, **GREEDY)
    assert cached.last_report.bypassed == "autocast"


def test_weights_written_past_autograd_are_noticed(client: KVStoreClient) -> None:
    model, prompt = tiny_model(), random_prompt(300, seed=20)
    cached = CachedModel(model, client)
    cached.generate(prompt, **GREEDY)
    client.store.flush()
    model.model.layers[1].self_attn.v_proj.weight.data += 0.1
    assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
    assert cached.last_report.reused_tokens == 0


def test_the_returned_cache_is_an_ordinary_one(client: KVStoreClient) -> None:
    model, prompt = tiny_model(), random_prompt(600, seed=21)
    cached = CachedModel(model, client)
    for _ in range(2):
        output = cached.generate(prompt, return_dict_in_generate=True, **GREEDY)
        client.store.flush()
    assert cached.last_report.reused_tokens == 512
    copied = copy.deepcopy(output.past_key_values)
    more = torch.cat([output.sequences, random_prompt(9, seed=22)], 1)
    assert torch.equal(
        model.generate(more, past_key_values=copied, **GREEDY),
        model.generate(more, past_key_values=output.past_key_values, **GREEDY),
    )


def test_eos_given_as_a_tensor(client: KVStoreClient) -> None:
    model, prompt = tiny_model(), random_prompt(300, seed=23)
    cached = CachedModel(model, client)
    arguments = GREEDY | {"eos_token_id": torch.tensor([3, 4]), "pad_token_id": 3}
    assert torch.equal(cached.generate(prompt, **arguments), model.generate(prompt, **arguments))
