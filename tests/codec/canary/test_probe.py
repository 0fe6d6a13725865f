"""The probe is the same in every process, and what is kept of it is bounded."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvstore_codec.canary.probe import NEAR_TOKENS, TOKENS, Probe, Sample
from kvstore_codec.errors import CanaryError
from tests.codec.chunks import make_spec

SPEC = make_spec()

_PRINT = """
from kvstore_codec.canary.probe import Probe
ids = Probe(49152, 8192).token_ids()
print(ids.sum(), ids[:3])
"""


def test_the_token_ids_are_those_of_every_process() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", _PRINT], capture_output=True, text=True, check=True, env=None
        ).stdout
        for _ in range(2)
    ]
    ids = Probe(49152, 8192).token_ids()
    assert printed == [f"{ids.sum()} {ids[:3]}\n"] * 2
    assert 0 <= ids.min() < ids.max() < 49152
    assert len(set(ids.tolist())) > 200


@pytest.mark.parametrize("length", [TOKENS, TOKENS + 1, 8192, 131072, 1 << 31])
def test_positions_rise_to_the_last_one(length: int) -> None:
    positions = Probe(100, length).positions()
    assert positions.shape == (TOKENS,)
    assert (np.diff(positions) > 0).all()
    assert positions[:NEAR_TOKENS].tolist() == list(range(NEAR_TOKENS))
    assert positions[-1] == length - 1


def test_a_model_with_few_positions_has_a_probe() -> None:
    assert Probe.reaching(7, 64).positions().tolist() == list(range(TOKENS))


@pytest.mark.parametrize(
    ("vocabulary", "length"),
    [
        (0, 8192),
        (-1, 8192),
        (1 << 40, 8192),
        (True, 8192),
        (10.5, 8192),
        ("x", 8192),
        (10, TOKENS - 1),
        (10, 1 << 40),
    ],
)
def test_a_probe_that_no_model_has_is_refused(vocabulary: int, length: int) -> None:
    with pytest.raises(CanaryError):
        Probe(vocabulary, length)


def test_a_small_model_keeps_sixteen_tokens_of_every_layer() -> None:
    sample = Sample.of(SPEC)
    assert sample.layers == tuple(range(SPEC.layers))
    assert len(sample.tokens) == 16
    assert sample.tokens[-1] == TOKENS - 1


@pytest.mark.parametrize(("layers", "kv_heads"), [(80, 8), (126, 8), (80, 64), (200, 512)])
def test_a_large_model_keeps_a_few_megabytes_with_the_last_layer_and_token(
    layers: int, kv_heads: int
) -> None:
    spec = replace(SPEC, layers=layers, kv_heads=kv_heads, head_dim=128)
    sample = Sample.of(spec)
    kept = len(sample.layers) * len(sample.tokens) * spec.kv_bytes_per_token // spec.layers
    assert (1 << 20) < kept <= 4 << 20
    assert sample.layers[-1] == layers - 1
    assert sample.tokens[-1] == TOKENS - 1


def test_a_layer_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(CanaryError, match="in a layer"):
        Sample.of(replace(SPEC, kv_heads=1 << 20, head_dim=128))
