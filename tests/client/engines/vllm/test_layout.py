"""KV is read from and written into blocks as vLLM packs them. Each layout is compared with a naive packing."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from kvstore_client.engines.vllm.destination import PagedDestination
from kvstore_client.engines.vllm.detect import LayerCache, detect, verify
from kvstore_client.engines.vllm.layout import (
    AmxCpuLayout,
    BlockLayout,
    PackedLayout,
    RowMajorCpuLayout,
    SeparateLayout,
)
from kvstore_codec.errors import InvalidKVError, UnsupportedEngineError

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, HEADS, TOKENS, DIM = 7, 3, 32, 32
CACHE = LayerCache(block_tokens=TOKENS, kv_heads=HEADS, head_dim=DIM, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One layout, with a naive description of the place of each value."""

    kind: type[BlockLayout]
    backend: str
    kernel: str | None
    empty: Callable[[], torch.Tensor]
    key: Callable[[torch.Tensor, int, int, int, int], torch.Tensor]
    """The one-element view of the key at (block, head, token, channel)."""
    value: Callable[[torch.Tensor, int, int, int, int], torch.Tensor]

    def layout(self) -> BlockLayout:
        return detect(self.empty(), CACHE, self.backend, self.kernel)


def memory() -> torch.Tensor:
    return torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16)


def tokens_first() -> torch.Tensor:
    """The logical shape `[blocks, kv_heads, tokens, 2 * head_dim]` over memory with tokens before heads."""
    return torch.zeros(BLOCKS, TOKENS, HEADS, 2 * DIM, dtype=torch.bfloat16).transpose(1, 2)


def layers_inside_blocks() -> torch.Tensor:
    """One of four layers whose blocks lie beside each other in memory."""
    return torch.zeros(BLOCKS, 4, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16)[:, 2]


def separate() -> torch.Tensor:
    return torch.zeros(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.bfloat16)


def at(block: torch.Tensor, place: int) -> torch.Tensor:
    return block.view(-1)[place]


HALF = TOKENS * DIM
CASES = {
    "cpu": Case(
        RowMajorCpuLayout,
        "CPU_ATTN",
        "vec",
        memory,
        lambda m, b, h, t, c: at(m[b, h], c * TOKENS + t),
        lambda m, b, h, t, c: at(m[b, h], HALF + t * DIM + c),
    ),
    "cpu with amx": Case(
        AmxCpuLayout,
        "CPU_ATTN",
        "amx",
        memory,
        lambda m, b, h, t, c: at(m[b, h], (t // 16 * DIM // 2 + c // 2) * 32 + t % 16 * 2 + c % 2),
        lambda m, b, h, t, c: at(m[b, h], HALF + c // 16 * TOKENS * 16 + t // 2 * 32 + c % 16 * 2 + t % 2),
    ),
    **{
        name: Case(
            PackedLayout,
            backend,
            None,
            empty,
            lambda m, b, h, t, c: m[b, h, t, c],
            lambda m, b, h, t, c: m[b, h, t, DIM + c],
        )
        for name, backend, empty in [
            ("packed, heads first", "FLASHINFER", memory),
            ("packed, tokens first", "FLASH_ATTN", tokens_first),
            ("packed, layers in blocks", "TRITON_ATTN", layers_inside_blocks),
        ]
    },
    "separate": Case(
        SeparateLayout,
        "FLASH_ATTN",
        None,
        separate,
        lambda m, b, h, t, c: m[0, b, t, h, c],
        lambda m, b, h, t, c: m[1, b, t, h, c],
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def random_kv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(HEADS, tokens, DIM, generator=generator).bfloat16() for _ in range(2))
    return keys, values


def test_detected_layouts_are_of_the_right_kind(case: Case) -> None:
    layout = case.layout()
    assert type(layout) is case.kind
    assert (layout.block_tokens, layout.kv_heads, layout.head_dim, layout.split) == (TOKENS, HEADS, DIM, 1)


def test_every_value_lies_where_the_engine_has_it(case: Case) -> None:
    keys, values = random_kv(TOKENS)
    tensor, naive = case.empty(), case.empty()
    case.layout().write(tensor, [5], 0, keys, values)
    for head in range(HEADS):
        for token in range(TOKENS):
            for channel in range(DIM):
                case.key(naive, 5, head, token, channel).fill_(keys[head, token, channel])
                case.value(naive, 5, head, token, channel).fill_(values[head, token, channel])
    assert torch.equal(tensor, naive)


@pytest.mark.parametrize(
    ("first", "tokens"),
    [(0, 128), (0, 5), (3, 4), (31, 2), (7, 25), (32, 32), (17, 90), (33, 95), (40, 0), (127, 1)],
)
def test_any_range_of_tokens_in_blocks_of_any_order(case: Case, first: int, tokens: int) -> None:
    """Other tokens of the same blocks, and other blocks, are left alone."""
    layout, tensor, table = case.layout(), case.empty(), [6, 0, 3, 2]
    before = random_kv(BLOCKS * TOKENS, seed=1)
    layout.write(tensor, range(BLOCKS), 0, *before)
    keys, values = random_kv(tokens, seed=2)
    layout.write(tensor, table, first, keys, values)
    places = torch.tensor(
        [table[t // TOKENS] * TOKENS + t % TOKENS for t in range(first, first + tokens)]
    ).long()
    for expected, new, found in zip(
        before, (keys, values), layout.read(tensor, range(BLOCKS), 0, BLOCKS * TOKENS), strict=True
    ):
        expected[:, places] = new
        assert torch.equal(found, expected)
    for new, found in zip((keys, values), layout.read(tensor, table, first, tokens), strict=True):
        assert torch.equal(found, new)
        assert found.shape == (HEADS, tokens, DIM)


def test_blocks_of_the_scheduler_that_the_kernel_splits() -> None:
    cache = LayerCache(block_tokens=3 * TOKENS, kv_heads=HEADS, head_dim=DIM, dtype=torch.bfloat16)
    layout = detect(memory(), cache, "FLASH_ATTN")
    assert (layout.block_tokens, layout.split) == (TOKENS, 3)
    tensor, (keys, values) = memory(), random_kv(100)
    layout.write(tensor, [1, 0], 20, keys, values)
    assert torch.equal(tensor[3, :, 20:, :DIM], keys[:, :12])
    assert torch.equal(tensor[0, :, :24, DIM:], values[:, 76:])

    def engine_write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        tensor[slots // TOKENS, :, slots % TOKENS] = torch.cat((keys, values), dim=-1)

    verify(layout, tensor, 1, engine_write)
    assert not tensor[3:6].any()


@pytest.mark.parametrize(("first", "tokens"), [(-1, 2), (60, 5), (65, 1), (0, 65)])
def test_tokens_outside_the_blocks_are_refused(case: Case, first: int, tokens: int) -> None:
    with pytest.raises(InvalidKVError, match="do not lie in 2 blocks of 32 tokens"):
        case.layout().read(case.empty(), [1, 2], first, tokens)


@pytest.mark.parametrize("block", [-1, BLOCKS])
def test_blocks_outside_the_tensor_are_refused(case: Case, block: int) -> None:
    with pytest.raises(InvalidKVError, match="outside the 7 blocks"):
        case.layout().write(case.empty(), [block], 0, *random_kv(1))


@pytest.mark.parametrize(
    ("tensor", "backend", "kernel", "reason"),
    [
        (memory().float(), "CPU_ATTN", "vec", "--kv-cache-dtype auto"),
        (memory(), "MLA_DREAM", None, "MLA_DREAM is unknown; the known backends are CPU_ATTN"),
        (memory(), "CPU_ATTN", "neon", "instruction set neon"),
        (memory(), "CPU_ATTN", None, "instruction set None"),
        (tokens_first(), "CPU_ATTN", "vec", "strides"),
        (memory()[..., 1:], "FLASH_ATTN", None, "unknown for vLLM's attention backend FLASH_ATTN"),
        (memory()[:, 1:], "FLASHINFER", None, "3 KV heads"),
        (memory()[:, :, :31], "FLASHINFER", None, "blocks of 32 tokens"),
        (separate().transpose(0, 1), "FLASHINFER", None, r"shape \(7, 2,"),
        (separate(), "CPU_ATTN", "vec", r"shape \(2, 7,"),
    ],
)
def test_unknown_tensors_are_refused_with_a_sentence(
    tensor: torch.Tensor, backend: str, kernel: str | None, reason: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=reason):
        detect(tensor, CACHE, backend, kernel)


def test_amx_packs_only_bfloat16_in_multiples_of_32() -> None:
    half = LayerCache(TOKENS, HEADS, DIM, torch.float16)
    with pytest.raises(UnsupportedEngineError, match=r"amx pack torch\.float16"):
        detect(memory().half(), half, "CPU_ATTN", "amx")
    narrow = LayerCache(TOKENS, HEADS, 16, torch.bfloat16)
    with pytest.raises(UnsupportedEngineError, match="head_dim of 16"):
        detect(memory()[..., :32].contiguous(), narrow, "CPU_ATTN", "amx")


def test_a_layout_that_the_engine_does_not_have_is_found_out(case: Case) -> None:
    layout, tensor = case.layout(), case.empty()

    def engine_write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        assert slots.tolist() == list(range(2 * TOKENS, 3 * TOKENS))
        layout.write(tensor, [2], 0, keys.transpose(0, 1), values.transpose(0, 1))

    verify(layout, tensor, 2, engine_write)
    assert not tensor.any()

    def swapped(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        engine_write(values, keys, slots)

    with pytest.raises(UnsupportedEngineError, match=f"{case.kind.__name__} reads other KV"):
        verify(layout, tensor, 2, swapped)
    assert not tensor.any()


def test_threads_fill_a_request_whose_ranges_share_blocks(case: Case) -> None:
    layers, tokens, step = 3, 120, 15
    tensors, table = [case.empty() for _ in range(layers)], [4, 1, 6, 0]
    destination = PagedDestination(case.layout(), tensors, table)
    assert destination.layers == layers
    stored = [random_kv(tokens, seed) for seed in range(layers)]

    def fill(first: int) -> None:
        with torch.inference_mode():
            for begin in (0, 1):
                chosen, positions = slice(begin, 1 + 2 * begin), slice(first, first + step)
                keys, values = destination.prepare(chosen, positions)
                for layer, (layer_keys, layer_values) in enumerate(stored[chosen]):
                    keys[layer], values[layer] = layer_keys[:, positions], layer_values[:, positions]
                destination.complete(chosen, positions, keys, values)

    threads = [threading.Thread(target=fill, args=(first,)) for first in range(0, tokens, step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tensor, kv in zip(tensors, stored, strict=True):
        for found, expected in zip(case.layout().read(tensor, table, 0, tokens), kv, strict=True):
            assert torch.equal(found, expected)
