import pytest

from kvstore_cluster.leases import LEASE_ID_BYTES, Findings, LeaseId, LeaseTable
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def leases(clock: Clock) -> LeaseTable[str]:
    return LeaseTable(max_lease_s=60.0, clock=clock)


def test_a_lease_holds_its_keys_until_released(leases: LeaseTable[str]) -> None:
    lease_id = leases.grant(["a", "b"], 10.0)
    assert len(lease_id) == LEASE_ID_BYTES
    assert leases.holds("a")
    assert leases.holds("b")
    assert not leases.holds("c")
    assert leases.release(lease_id)
    assert not leases.holds("a")
    assert not leases.release(lease_id)
    assert len(leases) == 0


def test_a_key_is_held_while_any_lease_covers_it(leases: LeaseTable[str]) -> None:
    first, second = leases.grant(["a"], 10.0), leases.grant(["a"], 10.0)
    leases.release(first)
    assert leases.holds("a")
    leases.release(second)
    assert not leases.holds("a")


def test_a_lease_ends_by_itself(leases: LeaseTable[str], clock: Clock) -> None:
    lease_id = leases.grant(["a"], 10.0)
    clock.now_s += 9.9
    leases.expire()
    assert leases.holds("a")
    clock.now_s += 0.2
    leases.expire()
    assert not leases.holds("a")
    assert not leases.renew(lease_id, 10.0)


def test_renewing_counts_from_now(leases: LeaseTable[str], clock: Clock) -> None:
    lease_id = leases.grant(["a"], 10.0)
    for _ in range(5):
        clock.now_s += 8.0
        assert leases.renew(lease_id, 10.0)
    clock.now_s += 10.1
    leases.expire()
    assert not leases.holds("a")


def test_no_lease_is_longer_than_the_cap(leases: LeaseTable[str], clock: Clock) -> None:
    lease_id = leases.grant(["a"], 1e9)
    assert leases.renew(lease_id, 1e9)
    clock.now_s += 60.1
    leases.expire()
    assert len(leases) == 0


def test_an_unknown_lease_is_neither_renewed_nor_released(leases: LeaseTable[str]) -> None:
    assert not leases.renew(LeaseId(b"x" * 16), 10.0)
    assert not leases.release(LeaseId(b"x" * 16))


def test_a_lease_may_cover_more(leases: LeaseTable[str], clock: Clock) -> None:
    lease_id = leases.cover(None, ["a"], 10.0)
    clock.now_s += 5.0
    assert leases.cover(lease_id, ["a", "b"], 10.0) == lease_id
    clock.now_s += 5.0
    leases.expire()
    assert not leases.holds("a")
    assert not leases.holds("b")
    assert leases.cover(lease_id, ["c"], 10.0) != lease_id


def bounded(clock: Clock) -> LeaseTable[str]:
    """Two leases of four keys are too many for it."""
    return LeaseTable(max_lease_s=60.0, clock=clock, max_leased=20)


def test_all_leases_together_are_bounded(clock: Clock) -> None:
    leases = bounded(clock)
    first = leases.grant("abcd", 10.0)
    assert first is not None
    assert leases.grant("efgh", 10.0) is None
    assert not leases.holds("e")
    assert leases.cover(first, "ij", 10.0) == first
    assert leases.cover(first, "abcdefghijklm", 10.0) is None
    assert len(leases) == 0
    assert not leases.holds("a")
    assert leases.grant("efgh", 10.0) is not None


def test_one_tenant_leaves_leases_for_others(clock: Clock) -> None:
    leases = LeaseTable[str](max_lease_s=60.0, clock=clock, max_leased=40, max_leased_of_tenant=20)
    first = leases.grant("abcd", 10.0, "greedy")
    assert first is not None
    assert leases.grant("abcd", 10.0, "greedy") is None
    assert leases.grant("abcd", 10.0, "acme") is not None
    assert leases.release(first)
    assert leases.grant("abcdefghij", 10.0, "greedy") is not None


def test_a_key_that_is_named_often_is_leased_once(clock: Clock) -> None:
    leases = bounded(clock)
    lease_id = leases.grant("a" * 1000, 10.0)
    assert leases.cover(lease_id, "a" * 1000, 10.0) == lease_id
    assert leases.release(lease_id)
    assert not leases.holds("a")


def test_what_may_be_used_is_bounded_with_the_leases(clock: Clock) -> None:
    leases = bounded(clock)
    for keys, count in (("ab", 10), ("ab" * 10, None)):
        lease_id = leases.grant(keys, 10.0)
        leases.expect_use(lease_id, Findings(list(keys * 5), range(5 * len(keys))))
        found = leases.expected_use(lease_id)
        assert (found and len(found.keys)) == count
        assert leases.narrow(lease_id, "b")
        assert not leases.holds("a")
        assert leases.release(lease_id)
    assert leases._leased == 0
    assert not leases._leased_of


def test_renewals_leave_nothing_behind(clock: Clock) -> None:
    leases = LeaseTable[str](max_lease_s=60.0, clock=clock)
    kept, forgotten = leases.grant("a", 10.0), leases.grant("b", 10.0)
    for _ in range(5000):
        clock.now_s += 0.001
        assert leases.renew(kept, 10.0)
    assert len(leases._expiries) < 2000
    clock.now_s += 6
    leases.expire()
    assert leases.holds("a")
    assert not leases.holds("b")
    assert not leases.release(forgotten)
    clock.now_s += 5
    leases.expire()
    assert len(leases) == 0
