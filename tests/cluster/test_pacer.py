"""The one schedule that all who send at a rate keep to."""

import threading

import pytest

from kvstore_cluster.pacer import Limit, Pacer
from kvstore_codec.errors import ConfigurationError


def test_bytes_leave_at_the_rate_and_a_burst_ahead_of_it() -> None:
    pacer = Pacer(1000.0, burst_bytes=500)
    assert [pacer.reserve(500, ready_at_s=10.0) for _ in range(3)] == [10.0, 10.5, 11.0]
    assert pacer.reserved_bytes == 1500
    # Time that was not used is saved up to one burst.
    assert [pacer.reserve(500, ready_at_s=100.0) for _ in range(2)] == [100.0, 100.5]


def test_a_new_rate_is_kept_from_then_on() -> None:
    pacer = Pacer(1000.0)
    assert pacer.reserve(1000, ready_at_s=0.0) == 1.0
    pacer.set_rate(500.0)
    assert pacer.reserve(1000, ready_at_s=0.0) == 3.0


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        Pacer(rate)


def test_whoever_waits_under_a_limit_goes_on_when_it_is_lifted() -> None:
    limit = Limit(1.0)
    waiter = threading.Thread(target=limit.wait_until, args=(limit.reserve(3600),))
    waiter.start()
    limit.lift()
    waiter.join(60)
    assert not waiter.is_alive()
