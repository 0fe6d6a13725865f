"""Measuring a small model: what comes out must be costs that a planner can work with, and be kept."""

import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.prefill_speed import Pass, sample_text
from kvstore_client.engines.transformers.profile import machine_of, measure_profile, profile_of
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.planning import PrefillCost, ProfileStore, profile_key
from kvstore_client.planning.prefill_fit import fit
from kvstore_codec.klt_frames import KLT
from kvstore_service.calibration import Options, calibrate, plan_passages
from tests.client.klt.calibrated import Silent, sharp_model
from tests.client.models import random_prompt, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_measured_profile_has_costs_of_everything(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    spec = spec_of(model)
    encodings = ("exact-zstd", "exact-raw", "medium-zstd", "low-hevc-cpu")
    profile = measure_profile(model, spec, encodings, decode_threads=3, budget_s=math.inf)
    assert tuple(profile.codecs) == encodings
    for cost in profile.codecs.values():
        assert 0 < cost.decode_s < 0.1
        assert 0 < cost.restore_s < 0.1
    assert profile.prefill.seconds(0, 2048) > 0
    assert 0 <= profile.interference <= 1
    assert profile.decode_threads == 3
    assert profile.provenance["kv_bytes_per_token"] == spec.kv_bytes_per_token
    json.dumps(dict(profile.provenance))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    measure_profile(model, spec_of(model), ["exact-zstd"], decode_threads=1)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_first_use_measures_and_the_next_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    spec, store = spec_of(model), ProfileStore(tmp_path)
    caplog.set_level(logging.INFO)
    first = profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1)
    assert "measured in" in caplog.text
    assert store.load(profile_key(spec, machine_of(model))) == first
    caplog.clear()
    assert profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1) == first
    assert not caplog.text
    # Without a calibration there is nothing to add.
    assert profile_of(model, spec, ["exact-zstd", "low-klt-pco"], None, store, decode_threads=1) == first
    more = profile_of(model, spec, ["exact-zstd", "exact-raw"], None, store, decode_threads=1)
    assert set(more.codecs) == {"exact-zstd", "exact-raw"}
    assert more.codecs["exact-zstd"] == first.codecs["exact-zstd"]
    assert store.load(profile_key(spec, machine_of(model))) == more


def test_with_a_calibration_its_encodings_are_measured_too() -> None:
    observed = ObservedModel(sharp_model())
    plan = plan_passages([random_prompt(2400, seed=9)[0]], 10**6, 8192)
    klt = KLT(calibrate(observed, plan, Options(period_layers=2, rank=8), Silent()))
    encodings = ["medium-klt-pco", "low-klt-zstd@128"]
    profile = measure_profile(
        observed.model, observed.spec, encodings, klt, decode_threads=1, budget_s=math.inf
    )
    assert set(profile.codecs) == set(encodings)
    assert min(cost.decode_s for cost in profile.codecs.values()) > 0


def test_what_there_was_no_time_for_costs_what_is_similar() -> None:
    model = tiny_model()
    encodings = ("exact-zstd", "exact-raw")
    profile = measure_profile(model, spec_of(model), encodings, decode_threads=1, budget_s=0.0)
    assert set(profile.codecs) == {"exact-zstd"}
    assert profile.codec("exact-raw") == profile.codecs["exact-zstd"]


def test_what_was_measured_on_a_busy_machine_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    spec, store = spec_of(model), ProfileStore(tmp_path)
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0 * cores, 0.0, 0.0))
    busy = profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1)
    assert profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1) == busy
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    quiet = profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1)
    assert quiet.provenance["load_per_core"] == 0.0
    assert profile_of(model, spec, ["exact-zstd"], None, store, decode_threads=1) == quiet


def test_an_encoding_that_this_machine_cannot_make_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    profile = measure_profile(
        model, spec_of(model), ["high-hevc-nvenc", "exact-raw"], decode_threads=1, budget_s=math.inf
    )
    if "high-hevc-nvenc" not in profile.codecs:
        assert "high-hevc-nvenc cannot be measured" in caplog.text
    assert "exact-raw" in profile.codecs


@pytest.mark.parametrize("cost", [PrefillCost(0.01, 4e-4, 2e-8), PrefillCost(0.0, 1e-3, 0.0)])
def test_costs_are_found_again_in_what_they_cause(cost: PrefillCost) -> None:
    places = [(0, 32), (0, 256), (0, 1024), (1024, 32), (1024, 256)]
    found = fit([Pass(first, tokens, cost.seconds(first, tokens)).timed for first, tokens in places])
    for first, tokens in ((0, 100), (0, 4096), (4096, 512)):
        assert found.seconds(first, tokens) == pytest.approx(cost.seconds(first, tokens), rel=1e-3)


def test_no_cost_is_negative_however_odd_the_times_are() -> None:
    passes = [Pass(0, 32, 0.5), Pass(0, 256, 0.4), Pass(0, 1024, 0.3), Pass(1024, 32, 0.01)]
    found = fit([one.timed for one in passes])
    assert min(found.fixed_s, found.per_token_s, found.per_pair_s) >= 0
    assert found.seconds(0, 256) > 0


def test_the_sample_text_is_like_text() -> None:
    text = sample_text(2048, 49152)
    assert torch.equal(text, sample_text(2048, 49152))
    assert int(text.min()) >= 0
    assert int(sample_text(2048, 512).max()) < 512
    counts = torch.bincount(text).sort(descending=True).values
    assert counts[0] > 10 * counts[20]
    assert int((counts > 0).sum()) > 100
