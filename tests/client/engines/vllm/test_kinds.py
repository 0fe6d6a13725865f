"""Which KV a vLLM worker exchanges with these settings, and which settings contradict themselves."""

from typing import Any

import pytest

from kvstore_client.engines.vllm.kinds import KeyKind, kind_named, kind_of, spec_of_kind
from kvstore_client.settings import EncodingSettings
from kvstore_codec.errors import ConfigurationError
from tests.codec.chunks import make_spec

HIGH, MEDIUM, LOW = "high-klt-pco", "medium-klt-pco", "low-klt-hevc-cpu"


def settings(**given: Any) -> EncodingSettings:
    return EncodingSettings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"encoding": "exact-raw"},
        {"encoding": "exact-zstd,exact-raw", "floor": "exact"},
        {"accept": "exact-raw,exact-zstd"},
    ],
)
def test_exact_settings_keep_keys_after_rope(given: dict[str, str]) -> None:
    assert kind_of(settings(**given)) is KeyKind.AFTER_ROPE


@pytest.mark.parametrize(
    "given",
    [
        {"encoding": MEDIUM},
        {"encoding": MEDIUM, "floor": "medium"},
        {"encoding": f"{MEDIUM},medium-zstd,{LOW}", "floor": "medium"},
        {"encoding": "medium-zstd", "accept": f"medium-zstd,{HIGH},exact-raw"},
        {"encoding": LOW, "floor": "low"},
        {"encoding": "step0.004-klt-pco"},
    ],
)
def test_lossy_settings_keep_keys_before_rope(given: dict[str, str]) -> None:
    assert kind_of(settings(**given)) is KeyKind.BEFORE_ROPE


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"encoding": f"exact-zstd,{MEDIUM}"}, "side by side.*computed behind lossy KV"),
        ({"floor": "medium"}, "reads exact chunks only"),
        ({"accept": f"exact-zstd,{MEDIUM}"}, f"reads exact chunks only.*{MEDIUM} is lossy"),
        ({"encoding": MEDIUM, "floor": "exact"}, "would never reuse its own KV"),
        ({"encoding": MEDIUM, "accept": "exact-zstd"}, "would never reuse its own KV"),
        ({"encoding": MEDIUM, "floor": "high"}, "would never reuse its own KV"),
        ({"encoding": HIGH, "floor": "medium"}, "accepts the rate medium cannot store high-klt-pco"),
        ({"encoding": f"{HIGH},{MEDIUM}"}, f"accepts {MEDIUM} cannot store {HIGH}"),
        ({"encoding": MEDIUM, "accept": f"{MEDIUM},{LOW}"}, f"accepts {LOW} cannot store {MEDIUM}"),
        (
            {"encoding": MEDIUM, "floor": "medium", "accept": "step0.004-klt-pco"},
            "accepts step0.004-klt-pco cannot store",
        ),
        ({"encoding": "step0.004-klt-pco", "floor": "high"}, "accepts the rate high cannot store step"),
    ],
)
def test_contradictions_are_refused_with_the_reason(given: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        kind_of(settings(**given))


def test_the_kinds_never_share_a_name() -> None:
    plain = make_spec()
    assert spec_of_kind(plain, KeyKind.BEFORE_ROPE) == plain
    after = spec_of_kind(plain, KeyKind.AFTER_ROPE)
    assert after.digest != plain.digest
    assert [kind_named(spec) for spec in (plain, after)] == [KeyKind.BEFORE_ROPE, KeyKind.AFTER_ROPE]
