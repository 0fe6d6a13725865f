"""The worker's half exchanges lossy KV with transformers workers: RoPE as vLLM's kernels compute it, loads, saves."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.embeddings import CheckpointEmbeddings
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.engines.vllm.before_rope import KeysBeforeRope
from kvstore_client.engines.vllm.layout import RowMajorCpuLayout
from kvstore_client.engines.vllm.loads import Loads
from kvstore_client.engines.vllm.memory import PagedMemory
from kvstore_client.engines.vllm.metadata import LoadRequest, SaveRequest
from kvstore_client.engines.vllm.rotation import KeyRotation, engine_rotation, rotation_of
from kvstore_client.engines.vllm.saves import Saves
from kvstore_client.engines.vllm.scheduler import SchedulerHalf
from kvstore_client.reuse.features import PromptFeatures
from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.model_spec import ModelSpec, RopeSpec
from tests.client.models import tiny_model
from tests.vllm.calibrated import calibration_of, loaded_model, publish, saved_sharp_model
from tests.vllm.processes import StoreProcess, free_port, prompt
from tests.vllm.scheduler_calls import answer, request, scheduled

pytestmark = pytest.mark.vllm

DIM, POSITIONS = 64, 4096
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
}
BLOCK = 128
MEDIUM = "medium-klt-pco"


@pytest.fixture
def engine_rope(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a rotary embedding as vLLM does for a model; there is no other one in the process then."""

    def make(kind: str, dtype: torch.dtype, *, neox: bool = True) -> Any:
        monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
        parameters = {"rope_type": kind, **ROPES[kind]}
        with set_current_vllm_config(VllmConfig()):
            return rotary_embedding.get_rope(
                DIM, POSITIONS, is_neox_style=neox, rope_parameters=parameters, dtype=dtype
            )

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", list(ROPES))
def test_keys_are_turned_as_vllm_turns_them(
    kind: str, dtype: torch.dtype, engine_rope: Callable[..., Any]
) -> None:
    rope = engine_rope(kind, dtype)
    found = engine_rotation(RopeSpec(kind, 10000.0, DIM), DIM)
    tokens, generator = slice(1000, 1300), torch.Generator().manual_seed(0)
    keys = (3 * torch.randn(300, 2, DIM, generator=generator)).to(dtype)
    _, turned = rope(torch.arange(1000, 1300), keys.clone().flatten(1), keys.clone().flatten(1))
    engines = turned.view(300, 2, DIM).transpose(0, 1)[None]
    ours = keys.transpose(0, 1)[None].clone()
    found.apply_(ours, tokens)
    # Its native kernels round each product, so that a pair of channels is off by two roundings of its length.
    expected = keys.transpose(0, 1)[None].contiguous()
    length = expected.float().view(1, 2, 300, 2, DIM // 2).norm(dim=-2).repeat(1, 1, 1, 2)
    most = 2 * torch.finfo(dtype).eps * length * float(found.cos[0, 0])  # yarn scales
    assert bool(((ours.float() - engines.float()).abs() <= most).all())
    found.undo_(engines, tokens)
    assert bool(((engines.float() - expected.float()).abs() <= 2 * most).all())


@pytest.mark.parametrize("kind", list(ROPES))
def test_vllm_and_transformers_mean_the_same_by_a_kind_of_rope(
    kind: str, engine_rope: Callable[..., Any]
) -> None:
    parameters = {"rope_type": kind, **ROPES[kind]}
    model = tiny_model(rope_parameters=parameters, head_dim=DIM, max_position_embeddings=POSITIONS)
    theirs = rotary_tables(model, POSITIONS, torch.float32, "cpu")[0]
    ours = rotation_of(engine_rope(kind, torch.float32), RopeSpec(kind, 10000.0, DIM), DIM)
    torch.testing.assert_close(ours.cos[:POSITIONS], theirs.cos[:, : DIM // 2], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.sin[:POSITIONS], theirs.sin[:, : DIM // 2], rtol=0, atol=1e-3)


def test_other_rotations_are_refused_with_the_reason(engine_rope: Callable[..., Any]) -> None:
    spec = RopeSpec("default", 10000.0, DIM)
    engine_rope("default", torch.float32, neox=False)
    with pytest.raises(UnsupportedEngineError, match="not rotated as two halves"):
        engine_rotation(spec, DIM)
    engine_rope("default", torch.float32)
    with pytest.raises(UnsupportedEngineError, match="32 of 64 channels"):
        engine_rotation(RopeSpec("default", 10000.0, 32), DIM)
    with set_current_vllm_config(VllmConfig()):
        rotary_embedding.get_rope(DIM, 99, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    with pytest.raises(UnsupportedEngineError, match="vLLM has 2 of them"):
        engine_rotation(spec, DIM)


def test_a_table_that_the_kernels_do_not_follow_is_found_out(engine_rope: Callable[..., Any]) -> None:
    rope = engine_rope("default", torch.float32)
    kernel = rope.forward_native
    rope._forward_method = lambda positions, *heads: kernel((positions - 1).clamp(min=0), *heads)
    with pytest.raises(UnsupportedEngineError, match="in another way than its table"):
        engine_rotation(RopeSpec("default", 10000.0, DIM), DIM)


@dataclass
class Setup:
    folder: Path
    store: StoreProcess
    model: PreTrainedModel
    spec: ModelSpec
    keys_before_rope: KeysBeforeRope

    def client(self, salt: str = "") -> KVStoreClient:
        """With texts of their own for each salt."""
        client = connect(
            self.store.started["address"],
            cache_dir=self.folder,
            encoding=MEDIUM,
            floor="medium",
            tenant_salt=salt,
        )
        assert client.prepare(self.spec).result(60) is not None
        return client

    def memory(self, blocks: int) -> PagedMemory:
        """Paged KV memory as vLLM's CPU kernels have it, filled with -1."""
        layout = RowMajorCpuLayout(BLOCK, self.spec.kv_heads, self.spec.head_dim)
        shape = (blocks, self.spec.kv_heads, BLOCK, 2 * self.spec.head_dim)
        return PagedMemory(layout, tuple(torch.full(shape, -1.0) for _ in range(self.spec.layers)))

    @torch.inference_mode()
    def computed(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values, `[layers, kv_heads, tokens, head_dim]`."""
        cache = DynamicCache()
        self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return torch.stack([layer.keys[0] for layer in cache.layers]), torch.stack(
            [layer.values[0] for layer in cache.layers]
        )

    def fetched(self, client: KVStoreClient, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values as a transformers worker restores them."""
        match = client.match(self.spec, client.chunk_ids(self.spec, tokens))
        assert match.tokens == len(tokens)
        buffers = client.buffers.acquire(self.spec, match.tokens)
        rotary = rotary_tables(self.model, match.tokens, torch.float32, "cpu")
        features = PromptFeatures(partial(embedded, self.model), torch.tensor(tokens))
        assert client.fetch(match, buffers, rotary, features=features).wait().complete
        return buffers.keys, buffers.values


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("lossy")
    store = StoreProcess(folder, free_port())
    saved = saved_sharp_model(folder / "model")
    publish(store.started["address"], folder, calibration_of(saved))
    model = loaded_model(saved)
    spec = spec_of(model)
    table = rotary_tables(model, 2048, torch.float32, "cpu")[0]
    half = spec.head_dim // 2
    rotation = KeyRotation(table.cos[:, :half], table.sin[:, :half])
    embed = CheckpointEmbeddings(saved, torch.float32)
    yield Setup(folder, store, model, spec, KeysBeforeRope(rotation, embed))
    store.close()


def stored_by_transformers(setup: Setup, tokens: list[int], salt: str) -> None:
    with setup.client(salt) as client:
        cached = CachedModel(setup.model, client)
        cached.generate(torch.tensor([tokens]), max_new_tokens=1, do_sample=False)
        client.store.flush()
        assert client.metrics.snapshot()["chunks_stored"] == len(tokens) // 256
        cached.close()


def saved_by_vllm(setup: Setup, tokens: list[int], salt: str, *, firsts: tuple[int, ...] = (0,)) -> None:
    """From blocks in another order than the text's, as many requests as there are `firsts`."""
    memory, blocks = setup.memory(len(tokens) // BLOCK + 1), list(range(len(tokens) // BLOCK, 0, -1))
    for tensor, keys, values in zip(memory.tensors, *setup.computed(tokens), strict=True):
        memory.layout.write(tensor, blocks, 0, keys, values)
    with setup.client(salt) as client:
        saves = Saves(client, setup.spec, memory.read_layer, setup.keys_before_rope)
        ids = tuple(client.chunk_ids(setup.spec, tokens))
        for first, end in zip(firsts, (*firsts[1:], len(ids)), strict=True):
            of_request = tuple(blocks[2 * first : 2 * end])
            saves.save(SaveRequest(ids[:end], 0, first, of_request, tuple(tokens[256 * first : 256 * end])))
        for tensor in memory.tensors:
            tensor.fill_(-1)  # the engine goes on
        client.store.flush()
        assert client.metrics.snapshot()["chunks_stored"] == len(ids)


def error(found: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Mean squared error relative to the variance, of keys and values together."""
    return sum(float((a - b).square().mean() / b.var()) for a, b in zip(found, exact, strict=True))


def test_what_vllm_saves_is_as_good_as_what_transformers_stores(setup: Setup) -> None:
    tokens = prompt(1280, seed=1)
    saved_by_vllm(setup, tokens, "vllm", firsts=(0, 1, 3))
    stored_by_transformers(setup, tokens, "transformers")
    exact = setup.computed(tokens)
    with setup.client("vllm") as mine, setup.client("transformers") as theirs:
        found, reference = setup.fetched(mine, tokens), setup.fetched(theirs, tokens)
        assert error(reference, exact) > 1e-4, "it is lossy"
        assert error(found, exact) == pytest.approx(error(reference, exact), rel=0.01)
        for half, expected in zip(found, exact, strict=True):
            # The first tokens of the text, which everything attends to, are exact.
            torch.testing.assert_close(half[:, :, :4], expected[:, :, :4], rtol=1e-5, atol=1e-5)
        cached = CachedModel(setup.model, mine)
        cached.generate(torch.tensor([[*tokens, 7]]), max_new_tokens=1, do_sample=False)
        assert cached.last_report.reused_tokens == 1280
        cached.close()


@pytest.mark.parametrize(("first", "end"), [(0, 1280), (128, 1152), (384, 512)])
def test_what_vllm_loads_is_what_transformers_restores(setup: Setup, first: int, end: int) -> None:
    tokens, salt = prompt(1280, seed=2), f"load {first}"
    stored_by_transformers(setup, tokens, salt)
    with setup.client(salt) as client:
        expected = setup.fetched(client, tokens)
        memory, blocks = setup.memory(12), (5, 3, 9, 1, 2, 11, 8, 4, 10, 6)
        loads = Loads(
            client,
            setup.spec,
            BLOCK,
            lambda request: memory.destination(request.block_ids),
            setup.keys_before_rope,
        )
        chunks = -(-end // 256)
        ids = tuple(client.chunk_ids(setup.spec, tokens))[:chunks]
        of_request, of_chunks = blocks[: end // BLOCK], tuple(tokens[first // 256 * 256 : 256 * chunks])
        loads.start(LoadRequest("r", ids, first, end, of_request, token_ids=of_chunks))
        deadline = time.monotonic() + 60
        while not (ended := loads.ended()).request_ids:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not ended.failed_blocks
        for layer in range(setup.spec.layers):
            for found, wanted in zip(memory.read_layer(layer, blocks, 1280), expected, strict=True):
                loaded = wanted[layer, :, first:end]
                torch.testing.assert_close(found[:, first:end], loaded, rtol=1e-5, atol=1e-5)
                assert bool((found[:, :first] == -1).all())
                assert bool((found[:, end:] == -1).all())
        loads.close()


def test_a_load_without_its_calibration_fails_and_is_computed(setup: Setup, tmp_path: Path) -> None:
    tokens = prompt(512, seed=3)
    stored_by_transformers(setup, tokens, "unready")
    away = connect(
        setup.store.started["address"],
        cache_dir=tmp_path,
        floor="medium",
        encoding=MEDIUM,
        tenant_salt="unready",
    )
    memory = setup.memory(5)
    loads = Loads(
        away, setup.spec, BLOCK, lambda load: memory.destination(load.block_ids), setup.keys_before_rope
    )
    away.calibrations.close()  # nothing can be downloaded any more
    ids = tuple(away.chunk_ids(setup.spec, tokens))
    loads.start(LoadRequest("r", ids, 0, 512, (1, 2, 3, 4), token_ids=tuple(tokens)))
    deadline = time.monotonic() + 60
    while not (ended := loads.ended()).request_ids:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert ended.failed_blocks == {1, 2, 3, 4}
    assert away.metrics.snapshot()["miss_calibration_loading"] == 1
    loads.close()
    away.close()


def test_the_scheduler_sends_the_tokens_that_lossy_kv_is_predicted_from(setup: Setup) -> None:
    tokens = prompt(1100, seed=4)
    stored_by_transformers(setup, tokens[:768], "scheduler")
    half = SchedulerHalf(setup.client("scheduler"), setup.spec, BLOCK)
    asked = request(tokens)
    assert answer(half, asked, 384) == (384, True)
    half.allocated(asked, list(range(1, 10)), 384)
    (load,) = half.take_loads()
    assert (load.first_chunk, load.token_ids) == (1, tuple(tokens[256:768]))
    half.received({"request"}, ())
    (save,) = half.saves(scheduled(asked, list(range(1, 10)), 332, computed=768))
    assert (save.first_chunk, save.token_ids) == (3, tuple(tokens[768:1024]))
    half.close()
