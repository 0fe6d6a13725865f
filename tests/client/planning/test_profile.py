import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore_client.planning import CodecCost, PrefillCost, Profile, ProfileStore, profile_key
from kvstore_client.planning.profile import UNMEASURED
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec

_PROFILE = Profile(
    {"exact-zstd": CodecCost(50e-6, 5e-6), "medium-klt-pco": CodecCost(90e-6, 5e-6)},
    PrefillCost(0.01, 4e-4, 1e-8),
    0.8,
    1,
    {"model": "m", "cores": 2},
)
_SPEC = ModelSpec("m", bytes(32), 4, 2, 16, KVDtype.BFLOAT16, RopeSpec("default", 1e4, 16))
_KEY = profile_key(_SPEC, {"cores": 2})


def test_a_pass_costs_something_a_token_and_a_pair() -> None:
    cost = PrefillCost(1.0, 0.1, 0.01)
    assert cost.seconds(0, 0) == 0.0
    assert cost.seconds(0, 10) == pytest.approx(1 + 1 + 0.5)
    assert cost.seconds(100, 10) == pytest.approx(1 + 1 + 10.5)


def test_keys_tell_models_and_machines_apart() -> None:
    assert len(_KEY) == 64
    assert profile_key(_SPEC, {"cores": 2}) == _KEY
    assert profile_key(_SPEC, {"a": 1, "b": 2}) == profile_key(_SPEC, {"b": 2, "a": 1})
    others = [
        profile_key(replace(_SPEC, layers=5), {"cores": 2}),
        profile_key(_SPEC, {"cores": 4}),
        profile_key(_SPEC, {"threads": 2}),
    ]
    assert len({_KEY, *others}) == 4


def test_what_was_not_measured_costs_what_the_most_similar_does() -> None:
    assert _PROFILE.codec("exact-zstd") is _PROFILE.codecs["exact-zstd"]
    assert _PROFILE.codec("exact-raw") is _PROFILE.codecs["exact-zstd"]
    assert _PROFILE.codec("low-klt-pco@256") is _PROFILE.codecs["medium-klt-pco"]
    assert _PROFILE.codec("low-klt-hevc-cpu") is _PROFILE.codecs["medium-klt-pco"]
    assert replace(_PROFILE, codecs={}).codec("exact-raw") == UNMEASURED


def test_another_layout_says_nothing_about_what_was_not_measured() -> None:
    """Else the smaller one of two encodings would be fetched always, and the cost of the other never be seen."""
    assert _PROFILE.codec("medium-zstd") == UNMEASURED


def test_a_profile_is_kept(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    assert store.load(_KEY) is None
    assert store.list() == {}
    store.save(_KEY, _PROFILE)
    assert ProfileStore(tmp_path).load(_KEY) == _PROFILE
    assert store.list() == {_KEY: _PROFILE}
    store.save(_KEY, replace(_PROFILE, interference=0.0))
    assert store.list() == {_KEY: replace(_PROFILE, interference=0.0)}
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == [f"{_KEY}.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 2}',
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
    ],
)
def test_a_damaged_profile_is_none(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = ProfileStore(tmp_path)
    store.save(_KEY, _PROFILE)
    (tmp_path / "profiles" / f"{_KEY}.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert store.load(_KEY) is None
    assert _KEY in caplog.text
    assert store.list() == {}
    store.save(_KEY, _PROFILE)
    assert store.load(_KEY) == _PROFILE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 1),
        ("interference", 3.0),
        ("interference", float("nan")),
        ("decode_threads", 0),
        ("decode_threads", float("inf")),
        ("codecs", {"exact-zstd": {"decode_s": -1.0, "restore_s": 0.0}}),
        ("codecs", {"no-such-encoding": {"decode_s": 1.0, "restore_s": 0.0}}),
        ("codecs", {"exact-zstd": 1.0}),
        ("codecs", []),
        ("prefill", {"fixed_s": 1.0}),
        ("prefill", {"fixed_s": float("inf"), "per_token_s": 0.0, "per_pair_s": 0.0}),
        ("provenance", 5),
    ],
)
def test_a_profile_that_makes_no_sense_is_none(tmp_path: Path, field: str, value: object) -> None:
    store = ProfileStore(tmp_path)
    store.save(_KEY, _PROFILE)
    path = tmp_path / "profiles" / f"{_KEY}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert store.load(_KEY) is None
