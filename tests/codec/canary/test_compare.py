"""What counts as rounding, and what as something else."""

import math
from dataclasses import replace

import pytest
import torch

from kvstore_codec.canary.compare import ProbeKV, compare, tolerance
from kvstore_codec.model_spec import KVDtype
from tests.codec.canary.test_sketch import sample_kv
from tests.codec.chunks import make_spec

ULP = {KVDtype.FLOAT32: 2**-24, KVDtype.FLOAT16: 2**-11, KVDtype.BFLOAT16: 2**-8}


def disturbed(kv: ProbeKV, share: float, layer: int = 2) -> ProbeKV:
    """With noise in the values of one layer, as a share of their spread."""
    values = kv.values.double()
    noise = torch.randn(values[layer].shape, generator=torch.Generator().manual_seed(1))
    values[layer] += share * values[layer].std() * noise
    return ProbeKV(kv.keys, values.to(kv.values.dtype))


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_the_same_agrees_and_another_text_does_not(dtype: KVDtype) -> None:
    spec = make_spec(dtype=dtype)
    same = compare(sample_kv(spec), sample_kv(spec), spec)
    assert same.agrees
    assert same.difference == 0
    other = compare(sample_kv(spec, 1), sample_kv(spec), spec)
    assert not other.agrees
    assert other.difference > 1


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_rounding_once_agrees(dtype: KVDtype) -> None:
    spec = make_spec(dtype=dtype)
    kept = sample_kv(spec)
    up = ProbeKV(*((part.double() * (1 + ULP[dtype])).to(part.dtype) for part in (kept.keys, kept.values)))
    assert compare(up, kept, spec).agrees


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_the_layer_and_the_half_that_differ_are_named(dtype: KVDtype) -> None:
    spec = make_spec(dtype=dtype)
    kept = sample_kv(spec)
    found = compare(disturbed(kept, 3 * tolerance(dtype, 2)), kept, spec)
    assert not found.agrees
    assert (found.layer, found.kind) == (2, "values")
    assert "values of layer 2 differ by" in str(found)


def test_permuted_heads_differ() -> None:
    spec = make_spec()
    kept = sample_kv(spec)
    assert not compare(ProbeKV(kept.keys.flip(1), kept.values), kept, spec).agrees


def test_large_means_do_not_hide_a_difference() -> None:
    """Keys with a bias may lie a hundred deviations from zero."""
    spec = make_spec(dtype=KVDtype.FLOAT32)
    kept = sample_kv(spec)
    biased, other = (ProbeKV(kv.keys, kv.values + 1000) for kv in (kept, disturbed(kept, 0.01)))
    assert compare(biased, biased, spec).agrees
    assert not compare(other, biased, spec).agrees


def test_one_token_of_many_may_tip_over() -> None:
    spec = make_spec()
    kept = sample_kv(spec)
    values = kept.values.clone()
    values[3, :, 5] *= -1
    assert compare(ProbeKV(kept.keys, values), kept, spec).agrees
    values[3, :, 5:10] *= -1
    assert not compare(ProbeKV(kept.keys, values), kept, spec).agrees


@pytest.mark.parametrize("dtype", list(KVDtype))
@pytest.mark.parametrize("size", [30.0, 1e4, 1e6, 1e18])
@pytest.mark.parametrize("tokens", range(1, 5))
def test_a_few_tokens_of_any_size_make_nobody_agree(dtype: KVDtype, size: float, tokens: int) -> None:
    """A canary that right and wrong workers agree with would let them share KV."""
    spec = make_spec(dtype=dtype)
    right, wrong = sample_kv(spec), sample_kv(spec, 1)
    slightly = disturbed(right, 3 * tolerance(dtype, 2))
    kept = ProbeKV(right.keys.clone(), right.values.clone())
    kept.keys[:, :, :tokens], kept.values[:, :, -tokens:] = min(size, 6e4), -min(size, 6e4)
    if dtype is not KVDtype.FLOAT16:
        kept.keys[:, :, :tokens], kept.values[:, :, -tokens:] = size, -size
    for worker in (wrong, slightly):
        assert not compare(worker, kept, spec).agrees
        assert not compare(kept, worker, spec).agrees


def test_a_canary_that_varies_more_than_a_worker_does_is_not_agreed_with() -> None:
    spec = make_spec(dtype=KVDtype.FLOAT32)
    own = sample_kv(spec)
    kept = ProbeKV(own.keys * 100, own.values * 100)
    found, other = compare(own, kept, spec), compare(kept, own, spec)
    assert not found.agrees
    assert found.difference == other.difference > 50


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_differs(value: float) -> None:
    spec = make_spec()
    kept = sample_kv(spec)
    values = kept.values.clone()
    values[4, 1, 0, 0] = value
    for own, theirs in ((ProbeKV(kept.keys, values), kept), (kept, ProbeKV(kept.keys, values))):
        found = compare(own, theirs, spec)
        assert not found.agrees
        assert found.layer == 4


def test_kv_without_any_spread_agrees_with_itself_only() -> None:
    spec = make_spec()
    kept = ProbeKV(*(torch.ones_like(part) for part in (sample_kv(spec).keys, sample_kv(spec).values)))
    assert compare(kept, kept, spec).agrees
    assert not compare(ProbeKV(kept.keys, kept.values * 1.5), kept, spec).agrees


def test_what_is_tolerated_grows_with_the_layer_up_to_a_bound() -> None:
    for dtype in KVDtype:
        allowed = [tolerance(dtype, layer) for layer in range(1000)]
        assert allowed == sorted(allowed)
        assert allowed[-1] <= 0.3


def test_layers_of_a_sample_are_those_of_the_model() -> None:
    spec = replace(make_spec(), layers=200, kv_heads=512, head_dim=128)
    kept = sample_kv(spec)
    assert compare(kept, kept, spec).agrees
    found = compare(disturbed(kept, 1.0, layer=-1), kept, spec)
    assert found.layer == 199
