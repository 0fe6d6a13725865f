import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.planning import Links


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _Wire:
    """Receives at a rate, in pieces, in virtual time."""

    def __init__(self) -> None:
        self.clock = _Clock()
        self.links = Links(self.clock)

    def receive(
        self,
        endpoint: str,
        rate: float,
        seconds: float,
        piece_bytes: int = 128 << 10,
        *,
        request: object = None,
        waited_for: bool = False,
    ) -> None:
        end_s = self.clock.now_s + seconds
        piece_bytes = max(piece_bytes, int(rate * seconds / 1000))
        while self.clock.now_s < end_s:
            took_s = piece_bytes / rate
            self.clock.now_s += took_s
            self.links.observe(endpoint, piece_bytes, took_s, request=request, waited_for=waited_for)


def test_nothing_is_known_of_what_was_never_heard_of() -> None:
    links = Links()
    assert links.bandwidth_Bps("a") is None
    assert links.latency_s("a") == 0.0
    links.observe("a", 10 << 20, 0.1)
    assert links.bandwidth_Bps("a") == pytest.approx(100 * (1 << 20))
    assert links.bandwidth_Bps("b") == links.bandwidth_Bps("a")


def test_an_unknown_endpoint_is_like_the_one_heard_of_last() -> None:
    wire = _Wire()
    wire.receive("a", 1e6, 0.3)
    wire.receive("b", 1e8, 0.3)
    assert wire.links.bandwidth_Bps("new") == wire.links.bandwidth_Bps("b")
    wire.receive("a", 1e6, 0.3)
    assert wire.links.bandwidth_Bps("new") == wire.links.bandwidth_Bps("a")
    # Asked once, nothing received yet: its latency is known, its bandwidth is not.
    wire.links.first_byte("new", 0.02)
    assert wire.links.latency_s("new") == 0.02
    assert wire.links.bandwidth_Bps("new") == wire.links.bandwidth_Bps("a")


@given(st.floats(6.0, 9.7), st.floats(6.0, 9.7), st.sampled_from([4 << 10, 64 << 10, 128 << 10]))
def test_a_step_is_followed_within_200_ms(before: float, after: float, piece_bytes: int) -> None:
    wire = _Wire()
    wire.receive("a", 10**before, 0.3, piece_bytes)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(10**before, rel=0.01)
    wire.receive("a", 10**after, 0.2, piece_bytes)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(10**after, rel=0.25)


def test_a_saw_is_followed_with_little_delay() -> None:
    wire = _Wire()
    for tenth in range(100):
        rate = (10 + 90 * abs(tenth % 40 - 20) / 20) * 1e6  # 10 to 100 MB/s and back in 4 s
        wire.receive("a", rate, 0.1, 64 << 10)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(rate, rel=0.25)


def test_a_little_noise_is_averaged() -> None:
    wire = _Wire()
    for turn in range(400):
        wire.receive("a", 5e7 if turn % 2 else 2e8, 1e-4, 128 << 10)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(8e7, rel=0.1)


def test_a_clock_tick_is_no_sample() -> None:
    links = Links()
    links.observe("a", 1000, 0.0)
    assert links.bandwidth_Bps("a") is None
    links.observe("a", 499_000, 0.01)
    assert links.bandwidth_Bps("a") == pytest.approx(5e7)


def test_nothing_received_for_a_while_shows() -> None:
    wire = _Wire()
    wire.receive("a", 1e8, 0.3)
    wire.clock.now_s += 0.5
    wire.links.observe("a", 0, 0.5)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(0.0, abs=1e7)


def test_after_a_silence_the_first_sample_replaces_the_estimate() -> None:
    wire = _Wire()
    wire.receive("a", 1e6, 0.5, 16 << 10)
    wire.clock.now_s += 60
    wire.links.observe("a", 1 << 20, 0.01)
    assert wire.links.bandwidth_Bps("a") == pytest.approx((1 << 20) / 0.01)


def test_an_estimate_that_is_not_confirmed_becomes_hopeful() -> None:
    """Otherwise a link that was slow once would never be tried again."""
    wire = _Wire()
    wire.receive("slow", 1e6, 1.0)
    wire.receive("fast", 1e9, 1.0)
    hopes = []
    for _ in range(5):
        hopes.append(wire.links.bandwidth_Bps("slow"))
        wire.clock.now_s += 30
    assert hopes == sorted(hopes)
    assert hopes[0] == pytest.approx(1e6, rel=0.05)
    assert hopes[2] == pytest.approx(4e6, rel=0.1)
    wire.clock.now_s += 3600
    assert wire.links.bandwidth_Bps("slow") == 125e6
    assert wire.links.bandwidth_Bps("fast") == pytest.approx(1e9, rel=0.05)


def test_latency_is_the_smoothed_first_byte() -> None:
    links = Links()
    links.first_byte("a", 0.01)
    links.first_byte("a", 0.03)
    assert 0.01 < links.latency_s("a") < 0.02
    assert links.latency_s("b") == 0.0


def test_what_comes_while_the_engine_computes_does_not_lower_the_estimate() -> None:
    wire = _Wire()
    wire.receive("a", 2e8, 0.3)
    with wire.links.computing():
        wire.receive("a", 5e7, 0.5)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(2e8)
    assert wire.links.busy_Bps("a") == pytest.approx(5e7)
    wire.receive("a", 1e8, 0.3)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8), "the engine has ended"


def test_what_comes_while_the_engine_computes_may_raise_the_estimate() -> None:
    wire = _Wire()
    wire.receive("a", 5e7, 0.3)
    with wire.links.computing():
        wire.receive("a", 1e8, 0.3)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8)


def test_a_link_that_drops_by_more_than_computing_explains_is_seen() -> None:
    wire = _Wire()
    wire.receive("a", 2e8, 0.3)
    with wire.links.computing():
        wire.receive("a", 6e7, 0.3)
        wire.receive("a", 6e6, 0.3)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(6e6, rel=0.25)
        assert wire.links.busy_Bps("a") == pytest.approx(6e7, rel=0.25), "that was not the engine's doing"


def test_while_nothing_else_is_known_what_comes_beside_the_engine_counts() -> None:
    wire = _Wire()
    with wire.links.computing():
        wire.receive("a", 3e7, 0.3)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(3e7)


def test_a_request_that_waits_for_its_own_bytes_is_not_in_their_way() -> None:
    wire = _Wire()
    own, other = object(), object()
    with wire.links.computing(request=own, waits=True):
        wire.receive("a", 1e8, 0.3, request=own)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8)
        wire.receive("a", 3e7, 0.3, request=other)
        assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8)
    wire.clock.now_s += 0.01
    wire.links.observe("a", 300_000, 0.02, request=other)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8), "the engine computed while that began to come"


def test_a_fetch_begins_with_the_mean_of_the_last_seconds() -> None:
    wire = _Wire()
    for _ in range(20):  # up and down, and down in the end
        wire.receive("a", 1e8, 0.2)
        wire.receive("a", 1e7, 0.2)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(1e7, rel=0.01)
    began_s = wire.clock.now_s
    assert wire.links.bandwidth_Bps("a", since_s=began_s) == pytest.approx(5.5e7, rel=0.15)
    wire.receive("a", 2e7, 0.05)
    assert 2.5e7 < (wire.links.bandwidth_Bps("a", since_s=began_s) or 0.0) < 5e7
    wire.receive("a", 2e7, 0.1)
    assert wire.links.bandwidth_Bps("a", since_s=began_s) == pytest.approx(2e7, rel=0.1)


def test_the_mean_forgets_a_link_that_has_changed_for_good() -> None:
    wire = _Wire()
    wire.receive("a", 1e8, 10.0)
    wire.receive("a", 1e7, 10.0)
    assert wire.links.bandwidth_Bps("a", since_s=wire.clock.now_s) == pytest.approx(1e7, rel=0.1)


def test_how_much_computing_explains_is_unlearned_when_the_link_is_fast_as_soon_as_it_ends() -> None:
    wire = _Wire()
    wire.receive("a", 3e9, 0.3)
    with wire.links.computing():
        wire.receive("a", 3e9, 0.3)
    for _ in range(3):
        wire.receive("a", 3e9, 0.3)
        with wire.links.computing():
            wire.receive("a", 3e8, 0.3)
    assert wire.links.busy_Bps("a") == pytest.approx(3e8, rel=0.1)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(3e9, rel=0.1)


def test_a_slow_link_teaches_nothing_about_computing() -> None:
    wire = _Wire()
    wire.receive("a", 1.5e7, 0.3)
    with wire.links.computing():
        wire.receive("a", 1.45e7, 0.5)
    assert wire.links.busy_Bps("a") is None


def test_an_engine_that_always_computes_does_not_keep_an_old_estimate_alive() -> None:
    wire = _Wire()
    wire.receive("a", 1e9, 0.3)
    with wire.links.computing():
        wire.receive("a", 5e7, 60.0)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(5e7, rel=0.1)


def test_a_long_question_waits_for_its_bytes_too() -> None:
    wire, request = _Wire(), object()
    with wire.links.computing(request=request):
        wire.receive("a", 1e8, 0.3, request=request, waited_for=True)
        wire.receive("a", 3e7, 0.05, request=request)
    assert wire.links.bandwidth_Bps("a") == pytest.approx(1e8)
