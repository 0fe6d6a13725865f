"""What each selector looks for."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from kvstore_client.recompute import ReusedChunk, Selector, select, selector
from kvstore_client.settings import SelectorName
from kvstore_codec.errors import ConfigurationError

CHUNKS = [
    ReusedChunk(range(4, 12), exact=True),
    ReusedChunk(range(12, 20), exact=False, content_id=b"a" * 32),
    ReusedChunk(range(22, 30), exact=False, content_id=b"b" * 32),
]
PROMPT = 33
REUSED = [position for chunk in CHUNKS for position in chunk.tokens]


@dataclasses.dataclass
class Layers:
    """A probe of a model of two layers whose KV and attention are given."""

    fresh: torch.Tensor
    """`[layers, K and V, kv_heads, tokens, head_dim]`."""
    stored: torch.Tensor
    attention: list[torch.Tensor]

    def question_attention(self, see: Callable[[torch.Tensor], None], every: int = 1) -> None:
        for weights in self.attention[every - 1 :: every]:
            see(weights)

    def fresh_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fresh[layer][0], self.fresh[layer][1]

    def stored_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stored[layer][0], self.stored[layer][1]


def probe() -> Layers:
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((2, 2, 2, len(REUSED), 4), generator=generator)
    attention = [torch.rand((3, 5, PROMPT), generator=generator).softmax(-1) for _ in range(2)]
    return Layers(kv.clone(), kv, attention)


def test_first_k_takes_the_first_of_each_chunk() -> None:
    assert select(selector("first_k"), CHUNKS, PROMPT, 0.25).tolist() == [12, 13, 22, 23]


def test_hkvd_takes_what_another_context_changed_at_layer_1() -> None:
    layers = probe()
    layers.fresh[0] += 100  # before anything looked around
    layers.fresh[1, 1, :, REUSED.index(24)] += 3
    layers.fresh[1, 1, 0, REUSED.index(15)] -= 2
    layers.fresh[1, 1, :, REUSED.index(5)] += 9  # exact: not computed, however it differs
    chosen = selector("hkvd")
    assert select(chosen, CHUNKS, PROMPT, 1 / 16, layers).tolist() == [24]
    assert select(chosen, CHUNKS, PROMPT, 2 / 16, layers).tolist() == [15, 24]
    scores = chosen.scores(CHUNKS, PROMPT, layers)
    assert scores[24] == pytest.approx(2 * 4 * 9, rel=1e-5)
    assert scores[15] == pytest.approx(4 * 4, rel=1e-5)


def test_query_takes_what_the_question_attends_to() -> None:
    layers = probe()
    scores = selector("query").scores(CHUNKS, PROMPT, layers)
    mean = torch.stack(layers.attention).mean((0, 1, 2))
    torch.testing.assert_close(scores, mean)
    layers.attention[1][:, :, 17] += 1.0
    layers.attention[1][:, :, 2] += 5.0  # not reused at all
    assert select(selector("query"), CHUNKS, PROMPT, 1 / 16, layers).tolist() == [17]


def test_a_question_without_tokens_attends_to_nothing() -> None:
    layers = probe()
    layers.attention = [torch.empty(3, 0, PROMPT)]
    assert select(selector("query"), CHUNKS, PROMPT, 0.125, layers).tolist() == [12, 13]


def test_random_goes_by_the_text_alone() -> None:
    chosen = select(selector("random"), CHUNKS, PROMPT, 0.5)
    assert len(chosen) == 8
    assert torch.equal(chosen, select(selector("random"), CHUNKS, PROMPT, 0.5))
    first, second = (select(selector("random"), [chunk], PROMPT, 0.5) for chunk in CHUNKS[1:])
    moved = dataclasses.replace(CHUNKS[1], tokens=range(40, 48))
    assert torch.equal(select(selector("random"), [moved], 50, 0.5) - 40, first - 12)
    assert not torch.equal(first - 12, second - 22)
    assert (first - 12).tolist() == [0, 1, 2, 6], "the same in every process"


@pytest.mark.parametrize("name", SelectorName)
def test_registry(name: str) -> None:
    one: Selector = selector(name)
    assert one.name == name
    assert selector(name) is one
    assert one.needs_kv == (name in ("focus", "hkvd", "query"))
    of = {"first_k": "document", "frequency": "chunk", "frequency-high": "chunk"}
    assert one.share_of == of.get(name, "prompt")


def test_a_selector_that_does_not_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"known are .*hkvd"):
        selector("magic")


@pytest.mark.parametrize("name", ["focus", "hkvd", "query"])
def test_who_needs_a_probe_says_so(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        select(selector(name), CHUNKS, PROMPT, 0.5)
