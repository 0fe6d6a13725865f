from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore_client.planning import CodecCost, Costs, PrefillCost, Profile

_PROFILE = Profile(
    {"exact-zstd": CodecCost(50e-6, 5e-6)}, PrefillCost(0.01, 4e-4, 1e-8), 1.0, 2, {"model": "m"}
)


def test_starts_from_the_profile() -> None:
    assert Costs(_PROFILE).snapshot() == _PROFILE


def test_a_slower_machine_shows_within_a_few_thousand_tokens() -> None:
    costs = Costs(_PROFILE)
    for _ in range(24):
        costs.observe_decode("exact-zstd", 256, 256 * 150e-6, 256 * 15e-6)
        costs.observe_prefill(1024, 256, 3 * _PROFILE.prefill.seconds(1024, 256))
    seen = costs.snapshot()
    assert seen.codecs["exact-zstd"].decode_s == pytest.approx(150e-6, rel=0.05)
    assert seen.codecs["exact-zstd"].restore_s == pytest.approx(15e-6, rel=0.05)
    assert seen.prefill.seconds(0, 512) == pytest.approx(3 * _PROFILE.prefill.seconds(0, 512), rel=0.05)


def test_one_slow_piece_changes_little() -> None:
    costs = Costs(_PROFILE)
    costs.observe_decode("exact-zstd", 64 / 8, 64 / 8 * 5e-3, 0.0)
    assert costs.snapshot().codecs["exact-zstd"].decode_s < 2 * 50e-6


def test_what_was_not_measured_is_what_is_seen_first() -> None:
    costs = Costs(_PROFILE)
    costs.observe_decode("medium-zstd", 32, 32 * 1e-3, 0.0)
    assert costs.snapshot().codecs["medium-zstd"] == CodecCost(1e-3, 0.0)


def test_nothing_is_learned_from_nothing() -> None:
    costs = Costs(_PROFILE)
    costs.observe_decode("exact-zstd", 0, 1.0, 1.0)
    costs.observe_prefill(0, 0, 1.0)
    assert costs.snapshot() == _PROFILE


def test_threads_may_observe_at_once() -> None:
    costs = Costs(_PROFILE)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            pool.submit(costs.observe_decode, "exact-zstd", 64, 64 * 100e-6, 64 * 5e-6)
    assert costs.snapshot().codecs["exact-zstd"].decode_s == pytest.approx(100e-6, rel=0.01)
