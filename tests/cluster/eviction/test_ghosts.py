"""The table of evicted chunks remembers the latest, in bounded memory."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.eviction.ghosts import GhostTable

IDENTITIES = st.integers(0, 10**6).map(lambda number: (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64))


@settings(deadline=None)
@given(puts=st.lists(st.tuples(IDENTITIES, st.integers(0, 255)), max_size=100, unique_by=lambda put: put[0]))
def test_a_ghost_is_found_once(puts: list[tuple[int, int]]) -> None:
    ghosts = GhostTable()
    for stamp, (identity, note) in enumerate(puts):
        ghosts.put(identity, stamp, note)
    for stamp, (identity, note) in enumerate(puts):
        assert ghosts.take(identity) == (stamp, note)
        assert ghosts.take(identity) is None


def test_the_oldest_are_forgotten_first() -> None:
    generator = random.Random(1)
    ghosts = GhostTable(10_000)
    identities = [generator.getrandbits(64) for _ in range(45_000)]
    for stamp, identity in enumerate(identities):
        ghosts.put(identity, stamp, 0)
    latest = sum(ghosts.take(identity) is not None for identity in identities[-4_500:])
    oldest = sum(ghosts.take(identity) is not None for identity in identities[:15_000])
    assert latest > 4_350
    assert oldest < 100


def test_strangers_are_not_taken_for_ghosts() -> None:
    generator = random.Random(2)
    ghosts = GhostTable(60_000)
    for stamp in range(60_000):
        ghosts.put(generator.getrandbits(64), stamp, 0)
    assert not any(ghosts.take(generator.getrandbits(64)) for _ in range(60_000))


def test_it_grows_with_the_store() -> None:
    generator = random.Random(3)
    ghosts = GhostTable(100)
    ghosts.reserve(300_000)
    identities = [generator.getrandbits(64) for _ in range(100_000)]
    for stamp, identity in enumerate(identities):
        ghosts.put(identity, stamp, 0)
    assert sum(ghosts.take(identity) is not None for identity in identities) > 99_000
