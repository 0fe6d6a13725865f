"""What is compared, by name."""

import pytest

from kvstore_bench.link.policies import (
    DEFAULT_POLICIES,
    KVFETCHER,
    STORED,
    policies_named,
    policy_named,
    stored_encodings,
)
from kvstore_client import ClientSettings
from kvstore_codec.encoding import Rate
from kvstore_codec.errors import ConfigurationError


def test_cold_is_always_first_and_each_comes_once() -> None:
    policies = policies_named(["raw", "exact-zstd", "raw", "cold"], Rate.MEDIUM, {})
    assert [policy.name for policy in policies] == ["cold", "raw", "exact-zstd"]


def test_raw_is_the_uncompressed_exact_encoding() -> None:
    assert policy_named("raw", None, {}).settings["accept"] == ("exact-raw",)


@pytest.mark.parametrize("name", ["raw", "medium-klt-pco", "kvfetcher", "adaptive"])
def test_the_environment_allows_no_other_encodings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_FLOOR", "exact")
    policy = policy_named(name, None, {})
    settings = ClientSettings(**policy.settings)
    some = {"exact-raw", "exact-zstd", *policy.encodings}
    assert {encoding for encoding in some if settings.encodings.accepts(encoding)} == set(policy.encodings)


def test_adaptive_ones_differ_in_one_setting_each() -> None:
    given = {"replan": True, "pipelined": True}
    adaptive, kept, serial = (
        policy_named(name, Rate.LOW, given).settings
        for name in ("adaptive", "adaptive-kept", "adaptive-serial")
    )
    assert adaptive == {"fetch_policy": "adaptive", "floor": "low"} | given
    assert kept == adaptive | {"replan": False}
    assert serial == adaptive | {"pipelined": False}


def test_every_encoding_that_a_policy_needs_is_stored_once() -> None:
    stored = stored_encodings(policies_named(DEFAULT_POLICIES, Rate.MEDIUM, {}))
    assert len(set(stored)) == len(stored)
    assert {"exact-raw", *STORED, *KVFETCHER} == set(stored)


@pytest.mark.parametrize(
    ("name", "floor", "meets"),
    [
        ("cold", Rate.EXACT, True),
        ("raw", Rate.EXACT, True),
        ("high-klt-pco", Rate.EXACT, False),
        ("high-klt-pco", Rate.MEDIUM, True),
        ("low-klt-pco", Rate.MEDIUM, False),
        ("step0.3-klt-pco", Rate.LOW, False),
        ("low-klt-pco", None, True),
        ("cachegen", Rate.MEDIUM, None),
        ("adaptive", Rate.MEDIUM, None),
        ("kvfetcher", Rate.HIGH, True),
        ("kvfetcher", Rate.EXACT, False),
    ],
)
def test_names_promise_fidelity_or_leave_it_open(name: str, floor: Rate | None, meets: bool | None) -> None:
    assert policy_named(name, floor, {}).meets(floor) is meets


@pytest.mark.parametrize("name", ["", "hot", "medium-klt-gzip", "adaptive-"])
def test_what_is_no_policy_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no policy"):
        policy_named(name, None, {})
