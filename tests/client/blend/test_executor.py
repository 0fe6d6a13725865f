"""The blend against the model's own forward pass, of which it is a part."""

import pytest
import torch

from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.recompute import selector
from kvstore_client.reuse.blend import Blend
from kvstore_client.settings import SelectorName
from kvstore_codec.errors import FetchError, UnsupportedModelError
from tests.client.blend.reference import Prompt, kv_of, prompt, sharp
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = {"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 2}
KINDS = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama3-rope", {}),
    "every-head-its-own-keys": ("llama", {"num_key_value_heads": 4}),
    "all-heads-one-key": ("llama", {"num_key_value_heads": 1}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2-windows", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-windows": ("qwen3", WINDOWS),
    "mistral": ("mistral", {}),
    "mistral-windows": ("mistral-windows", {}),
    "mistral-narrow-windows": ("mistral", {"sliding_window": 17}),
}
SELECTORS = [SelectorName.FOCUS, SelectorName.HKVD]


@pytest.fixture(params=["llama3-rope", "qwen2-windows", "qwen3", "mistral-windows"])
def case(request: pytest.FixtureRequest) -> Prompt:
    family, sizes = KINDS[request.param]
    return prompt(sharp(family, **sizes))


@pytest.fixture(params=KINDS)
def any_case(request: pytest.FixtureRequest) -> Prompt:
    family, sizes = KINDS[request.param]
    return prompt(sharp(family, **sizes))


def answer(case: Prompt, blend: Blend, selected: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the question's tokens."""
    with torch.inference_mode():
        hidden = blend.compute(selected, drift=False, question=True)
        return blend._decoder.log_probabilities(hidden)


def some(case: Prompt, share: float = 0.3) -> torch.Tensor:
    chosen = torch.rand(len(case.approximate), generator=torch.Generator().manual_seed(3)) < share
    return case.approximate[chosen]


def check_buffers(case: Prompt, blend: Blend, selected: torch.Tensor, *, last: bool = True) -> None:
    _, _, cache = case.expected(selected)
    end = len(case.tokens) if last else -1
    for layer, expected in enumerate(cache.layers):
        for ours, theirs in (
            (blend.kv.keys[layer], expected.keys[0]),
            (blend.kv.values[layer], expected.values[0]),
        ):
            torch.testing.assert_close(ours[:, :end], theirs[:, :end], rtol=1e-4, atol=1e-4)


def test_all_recomputed_is_the_models_own_pass(any_case: Prompt) -> None:
    case = any_case
    with torch.inference_mode():
        expected = case.model(case.tokens[None]).logits[0, case.question :].log_softmax(-1)
    torch.testing.assert_close(answer(case, case.blend(), case.approximate), expected, rtol=1e-4, atol=1e-4)
    unlike = answer(case, case.blend(), some(case))
    assert (unlike - expected).abs().max() > 0.01  # what is stored matters here


def test_nothing_recomputed_of_exact_chunks_is_the_models_own_pass(any_case: Prompt) -> None:
    case = any_case
    exact = prompt(case.model, all_exact=True)
    with torch.inference_mode():
        expected = exact.model(exact.tokens[None]).logits[0, exact.question :].log_softmax(-1)
    nothing = torch.empty(0, dtype=torch.int64)
    blend = exact.blend()
    torch.testing.assert_close(answer(exact, blend, nothing), expected, rtol=1e-4, atol=1e-4)
    check_buffers(exact, blend, nothing)


def test_some_recomputed_among_the_others(any_case: Prompt) -> None:
    case = any_case
    selected, blend = some(case), case.blend()
    expected, _, _ = case.expected(selected)
    got = answer(case, blend, selected)
    torch.testing.assert_close(got, expected[case.question :], rtol=1e-4, atol=1e-4)
    check_buffers(case, blend, selected)


@pytest.mark.parametrize("family", ["llama", "qwen2-windows", "qwen3", "mistral-windows"])
def test_bfloat16_is_as_near_as_the_models_own(family: str) -> None:
    model, single = sharp(family, torch.bfloat16), sharp(family)
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    case = prompt(model)
    with torch.inference_mode():
        theirs, true = (
            m(case.tokens[None]).logits[0, case.question :].float().log_softmax(-1) for m in (model, single)
        )
    ours = answer(case, case.blend(), case.approximate)
    assert (ours - true).abs().mean() < 1.5 * (theirs - true).abs().mean()
    assert (answer(case, case.blend(), some(case)) - true).abs().mean() > 2 * (theirs - true).abs().mean()


@pytest.mark.parametrize("name", SELECTORS)
def test_choosing_changes_nothing(case: Prompt, name: str) -> None:
    """What the first look at the question leaves behind is no part of the answer."""
    selected = some(case)
    blend = case.blend()
    with torch.inference_mode():
        chosen = blend.choose(selector(name), 0.2)
    assert len(chosen) == int(0.2 * len(case.approximate))
    torch.testing.assert_close(
        answer(case, blend, selected), answer(case, case.blend(), selected), rtol=1e-4, atol=1e-4
    )
    check_buffers(case, blend, selected)


def test_a_token_in_the_middle_sees_nothing_behind_it(any_case: Prompt) -> None:
    """With a mask that is triangular at its lower right, counted from the end, it would see all but a few tokens."""
    case = any_case
    first, *_, last = [chunk for chunk in case.chunks if not chunk.exact]
    middle = torch.arange(first.tokens.start + 20, first.tokens.start + 24)
    blends = [case.blend()]
    case.stored.keys[:, :, last.tokens.start :] *= -3
    case.stored.values[:, :, last.tokens.start :] += 7
    blends.append(case.blend())
    answers = [answer(case, blend, middle) for blend in blends]
    one, other = blends
    for layer in range(one.kv.keys.shape[0]):
        for tensor in ("keys", "values"):
            ours, theirs = (getattr(blend.kv, tensor)[layer][:, : last.tokens.start] for blend in blends)
            assert torch.equal(ours, theirs)
    assert not torch.equal(one.kv.keys[-1][:, case.question :], other.kv.keys[-1][:, case.question :])
    assert not torch.allclose(*answers)


def weights(case: Prompt, blend: Blend, every: int = 1) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        blend.question_attention(lambda weights: seen.append(weights.clone()), every)
    return seen


@pytest.mark.parametrize("question", [1, 20, 128, 129, 300])
@pytest.mark.parametrize("family", ["llama", "qwen2-windows", "mistral-windows"])
def test_the_question_looks_as_in_the_model(family: str, question: int) -> None:
    """Nothing is hidden where all that is not reused stands before the first approximate chunk."""
    case = prompt(sharp(family), question)
    gap = slice(158 + 64, 158 + 64 + 11)
    kv = kv_of(case.model, case.tokens[: gap.stop])
    case.stored.keys[:, :, gap], case.stored.values[:, :, gap] = kv.keys[:, :, gap], kv.values[:, :, gap]
    case.chunks.insert(3, type(case.chunks[0])(range(gap.start, gap.stop), exact=True))
    eager = type(case.model)._from_config(case.model.config, attn_implementation="eager").eval()
    eager.load_state_dict(case.model.state_dict())
    expected = looked(eager, case)
    seen = weights(case, case.blend())
    assert len(seen) == 5
    asked = min(question, 128)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.shape == (4, asked, len(case.tokens))
        torch.testing.assert_close(ours, theirs[0, :, -asked:].float(), rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(weights(case, case.blend(), every=3), expected[2::3], strict=True):
        torch.testing.assert_close(ours, theirs[0, :, -asked:].float(), rtol=1e-3, atol=1e-5)


def looked(eager: torch.nn.Module, case: Prompt) -> tuple[torch.Tensor, ...]:
    own = case.model
    case.model = eager  # type: ignore[assignment]
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, output: seen.append(output[1]))
        for layer in eager.get_decoder().layers  # type: ignore[operator]
    ]
    case.expected(torch.empty(0, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    case.model = own
    return tuple(seen)


def test_what_is_not_computed_yet_is_not_looked_at(case: Prompt) -> None:
    """Neither the tail of a document nor new text behind approximate chunks: there is nothing of them."""
    hidden = ~torch.zeros(len(case.tokens), dtype=torch.bool)
    for chunk in case.chunks:
        hidden[chunk.tokens.start : chunk.tokens.stop] = False
    hidden[: case.approximate[0]] = False
    hidden[case.question :] = False
    assert hidden.sum() == 11
    seen = weights(case, case.blend())
    case.tokens = case.tokens.clone()
    case.tokens[hidden] = random_prompt(11, seed=77)[0]
    for one, other in zip(seen, weights(case, case.blend()), strict=True):
        assert torch.equal(one, other)
        assert not one[:, :, hidden].any()
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:2]))


def test_fresh_kv_is_the_models_own(case: Prompt) -> None:
    own, reused = kv_of(case.model, case.tokens), [p for c in case.chunks for p in c.tokens]
    for layer in (0, 1, 3):
        blend = case.blend()
        with torch.inference_mode():
            for ours, theirs in zip(
                blend.stored_kv(layer), (case.stored.keys, case.stored.values), strict=True
            ):
                torch.testing.assert_close(ours, theirs[layer][:, reused], rtol=1e-4, atol=1e-4)
            for ours, theirs in zip(blend.fresh_kv(layer), (own.keys, own.values), strict=True):
                torch.testing.assert_close(ours, theirs[layer][:, reused], rtol=1e-4, atol=1e-4)


def test_keys_that_are_kept_are_those_before_rope(case: Prompt) -> None:
    tail, beginning = range(64, 94), range(222, 230)
    selected = some(case)
    for name in (None, SelectorName.FOCUS, SelectorName.HKVD):
        blend = case.blend(keep=[tail, beginning])
        with torch.inference_mode():
            if name is not None:
                blend.choose(selector(name), 0.2)
            blend.compute(selected, drift=False, question=False)
        _, made, _ = case.expected(selected)
        for place in (tail, beginning):
            expected = made.keys[:, :, place.start : place.stop]
            torch.testing.assert_close(blend.unrotated_keys(place), expected, rtol=1e-4, atol=1e-4)


def test_layers_are_waited_for_in_their_turn(case: Prompt) -> None:
    """The layer behind the one that is computed may come meanwhile, and one that does not come ends the pass."""
    answer(case, case.blend(), some(case))
    assert case.waited == sorted(case.waited)
    assert set(case.waited) == set(range(5))
    blend = case.blend()
    arrived = blend._layers._arrived

    def lost(layer: int) -> None:
        if layer == 3:
            raise FetchError("layer 3 is lost")
        arrived(layer)

    blend._layers._arrived = lost
    for act in (
        lambda: blend.compute(some(case), drift=True, question=False),
        lambda: blend.choose(selector(SelectorName.FOCUS), 0.2),
    ):
        with torch.inference_mode(), pytest.raises(FetchError, match="layer 3"):
            act()


def test_the_last_token_is_left_to_the_model(case: Prompt) -> None:
    selected, blend = some(case), case.blend()
    with torch.inference_mode():
        assert not blend.compute(selected, drift=False, question=False).numel()
    check_buffers(case, blend, selected, last=False)


def test_choosing_all_or_nothing_takes_no_pass(case: Prompt) -> None:
    for ratio, expected in ((0.0, torch.empty(0, dtype=torch.int64)), (1.0, case.approximate)):
        with torch.inference_mode():
            assert torch.equal(case.blend().choose(selector(SelectorName.FOCUS), ratio), expected)
    assert not case.waited


def test_a_window_that_reaches_no_chunk_makes_them_worthless() -> None:
    """The question sees 17 tokens back in every layer: what is recomputed further off does not matter to its end."""
    case = prompt(sharp("mistral", sliding_window=17), 120)
    nothing = torch.empty(0, dtype=torch.int64)
    one, other = (answer(case, case.blend(), selected) for selected in (nothing, case.approximate))
    reach = 5 * 16 + 1
    assert torch.equal(one[reach:], other[reach:])
    assert not torch.allclose(one[:16], other[:16])


def test_a_family_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"gemma3_text.*llama, mistral, qwen2, qwen3"):
        Decoder(tiny_model("gemma3"))


def test_focus_chooses_what_the_question_looks_at(case: Prompt) -> None:
    """Of all the approximate chunks together, `focus` picks what the question looks at most closely."""
    blend = case.blend()
    with torch.inference_mode():
        chosen = blend.choose(selector(SelectorName.FOCUS), 0.1)
    total = sum(w.square().sum((0, 1)) for w in weights(case, case.blend(), every=3))
    budget = int(0.1 * len(case.approximate))
    best = case.approximate[total[case.approximate].argsort(descending=True, stable=True)[:budget]]
    assert torch.equal(chosen, best.sort().values)
