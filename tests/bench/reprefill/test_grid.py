"""What `auto` is compared with: the quickest pair that loses no more."""

from typing import Any

from kvstore_bench.reprefill.grid import _targets
from kvstore_codec.encoding import Rate


def row(
    system: str, budget: float | None, encoding: str, ttft_s: float, kl: float | None, **more: Any
) -> dict[str, Any]:
    facts = {
        "system": system,
        "disk": "ssd",
        "budget": budget,
        "encoding": encoding,
        "ttft_s": ttft_s,
        "kl": kl,
    }
    return facts | {"floor": None} | more


PAIRS = [
    row("pair", None, "exact-zstd", 0.8, 0.0),
    row("pair", None, "low-klt-pco", 0.5, 0.05),
    row("pair", 0.5, "exact-zstd", 0.55, 0.03),
    row("pair", 0.05, "exact-zstd", 0.2, 0.4),
    row("pair", 0.5, "exact-zstd", 0.1, 0.0, disk="hdd"),
]


def test_the_best_pair_is_within_the_floor_and_on_the_same_disk() -> None:
    auto = row("auto", 0.5, "exact-zstd", 0.6, 0.03, floor=Rate.LOW)
    of_auto, of_pair = _targets([*PAIRS, auto])
    assert of_auto["figure"] == 0.6 / 0.5
    assert of_pair["figure"] == 0.55 / 0.5
    assert of_auto["met"] == "missed"
    assert "50% in exact-zstd, best all in low-klt-pco" in of_auto["where"]


def test_a_choice_that_loses_more_than_the_floor_is_compared_with_pairs_that_do() -> None:
    auto = row("auto", 0.05, "exact-zstd", 0.21, 0.4, floor=Rate.HIGH)
    of_auto, of_pair = _targets([*PAIRS, auto])
    assert (of_auto["figure"], of_pair["figure"]) == (0.21 / 0.2, 1.0)


def test_a_choice_outside_the_grid_is_compared_by_its_own_time() -> None:
    auto = row("auto", None, "exact-zstd+low-klt-pco", 0.5, None, floor=Rate.LOW)
    (of_auto,) = _targets([*PAIRS, auto])
    assert of_auto["met"] == "met"
