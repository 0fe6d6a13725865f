from dataclasses import replace

from kvstore_client.planning import COMPUTE, KVFetcherPlanner, Option
from tests.client.planning.works import chunk, work

_PLANNER = KVFetcherPlanner()
# Larger pictures have fewer bytes and take longer to decode.
_RESOLUTIONS = (
    Option("high-hevc-cpu", 2_200_000, 0.05, 0.001),
    Option("high-hevc-cpu@128", 2_000_000, 0.07, 0.001),
    Option("high-hevc-cpu@256", 1_900_000, 0.1, 0.001),
)


def _choices(bandwidth_bytes_per_s: float, *options: Option, **more: object) -> set[int]:
    chunks = [replace(chunk(index), options=options, **more) for index in range(4)]
    return set(_PLANNER.plan(work(chunks, bandwidth_bytes_per_s)).choices.values())


def test_the_resolution_follows_the_bandwidth() -> None:
    assert _choices(1e6, *_RESOLUTIONS) == {2}
    assert _choices(29e6, *_RESOLUTIONS) == {1}
    assert _choices(1e9, *_RESOLUTIONS) == {0}


def test_the_precision_does_not() -> None:
    low = Option("low-hevc-cpu", 100, 0.0, 0.0)
    ours = Option("high-klt-pco", 100, 0.0, 0.0)
    assert _choices(1e6, ours, *_RESOLUTIONS, low) == {3}
    assert _choices(1e6, ours, low) == {1}
    assert _choices(1e6, ours) == {0}


def test_it_never_computes_what_can_be_fetched() -> None:
    assert COMPUTE not in _choices(1.0, *_RESOLUTIONS)
    assert _choices(1.0) == {COMPUTE}
    assert _choices(1e6, _RESOLUTIONS[0], computable=False) == {0}
