import os
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore_cluster.arena import Arena, Extent
from kvstore_codec.errors import ArenaFullError, ConfigurationError, StorageError

BLOCK = 16


def fill(arena: Arena, extent: Extent, data: bytes) -> None:
    position = 0
    for view in arena.views(extent):
        view[:] = data[position : position + len(view)]
        position += len(view)


def contents(arena: Arena, extent: Extent) -> bytes:
    return b"".join(arena.views(extent))


class ArenaMachine(RuleBasedStateMachine):
    """In whatever order extents come and go: blocks are owned once and bytes stay what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(40 * BLOCK, BLOCK)
        self.held: list[tuple[Extent, bytes]] = []
        self.random = random.Random(1)

    @rule(size_bytes=st.integers(1, 12 * BLOCK))
    def allocate(self, size_bytes: int) -> None:
        free_bytes = self.arena.capacity_bytes - self.arena.used_bytes
        if self.arena.footprint_bytes(size_bytes) > free_bytes:
            with pytest.raises(ArenaFullError):
                self.arena.allocate(size_bytes)
            return
        extent = self.arena.allocate(size_bytes)
        data = self.random.randbytes(size_bytes)
        fill(self.arena, extent, data)
        self.held.append((extent, data))

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False))
    def free(self, choice: random.Random) -> None:
        extent, data = self.held.pop(choice.randrange(len(self.held)))
        assert contents(self.arena, extent) == data
        self.arena.free(extent)

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False))
    def read_a_part(self, choice: random.Random) -> None:
        extent, data = choice.choice(self.held)
        begin = choice.randrange(len(data) + 1)
        end = choice.randrange(begin, len(data) + 1)
        assert b"".join(self.arena.views(extent, begin, end - begin)) == data[begin:end]

    @invariant()
    def every_block_is_owned_once(self) -> None:
        self.arena.check_integrity(extent for extent, _ in self.held)
        assert self.arena.used_bytes == sum(extent.blocks for extent, _ in self.held) * BLOCK


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_freed_extent_is_used_again_first() -> None:
    arena = Arena(100 * BLOCK, BLOCK)
    first = arena.allocate(5 * BLOCK)
    arena.free(first)
    assert arena.allocate(5 * BLOCK).runs == first.runs


def test_views_write_into_the_arena_without_a_copy() -> None:
    arena = Arena(4 * BLOCK, BLOCK)
    extent = arena.allocate(BLOCK)
    next(arena.views(extent))[3] = 77
    assert contents(arena, extent)[3] == 77


def test_ranges_outside_an_extent_are_refused() -> None:
    arena = Arena(4 * BLOCK, BLOCK)
    extent = arena.allocate(BLOCK + 3)
    for offset, length in [(-1, 2), (0, BLOCK + 4), (BLOCK + 3, 1), (3, -1)]:
        with pytest.raises(StorageError, match="outside an extent"):
            list(arena.views(extent, offset, length))


def test_a_block_owned_twice_or_by_nobody_is_found() -> None:
    arena = Arena(8 * BLOCK, BLOCK)
    first, second = arena.allocate(BLOCK), arena.allocate(BLOCK)
    with pytest.raises(StorageError, match="corrupt"):
        arena.check_integrity([first])
    with pytest.raises(StorageError, match="corrupt"):
        arena.check_integrity([first, second, second])


@pytest.mark.parametrize("memory_bytes", [-1, 0, BLOCK - 1])
def test_too_little_memory_is_refused(memory_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="raise --memory"):
        Arena(memory_bytes, BLOCK)


@pytest.mark.parametrize(
    "memory_bytes", [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 1, 1 << 80]
)
def test_more_memory_than_the_machine_has_is_refused(memory_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="lower --memory"):
        Arena(memory_bytes)


def test_neighbours_that_were_freed_are_one_run() -> None:
    arena = Arena(40 * BLOCK, BLOCK)
    extents = [arena.allocate(5 * BLOCK) for _ in range(8)]
    random.Random(3).shuffle(extents)
    for extent in extents:
        arena.free(extent)
    assert len(arena.allocate(40 * BLOCK).runs) == 1


def test_a_hole_that_fits_is_taken_before_a_longer_one() -> None:
    arena = Arena(40 * BLOCK, BLOCK)
    long, _, short, *_ = [arena.allocate(blocks * BLOCK) for blocks in (8, 1, 3, 28)]
    arena.free(long)
    arena.free(short)
    assert arena.allocate(3 * BLOCK).runs == short.runs
    assert arena.allocate(8 * BLOCK).runs == long.runs


def test_where_no_hole_fits_the_longest_are_taken() -> None:
    arena = Arena(40 * BLOCK, BLOCK)
    holes = [arena.allocate(blocks * BLOCK) for blocks in (1, 1, 2, 1, 6, 1, 4, 24)][::2]
    for hole in holes:
        arena.free(hole)
    assert [count for _, count in arena.allocate(11 * BLOCK).runs] == [6, 4, 1]


def test_chunks_of_many_sizes_stay_in_few_pieces() -> None:
    """However long they come and go, with a twentieth of the memory free."""
    choose = random.Random(5)
    arena = Arena(4096 * BLOCK, BLOCK)
    held: list[Extent] = []
    pieces = []
    for _ in range(5000):
        blocks = choose.randint(8, 128)
        while arena.capacity_bytes - arena.used_bytes < (blocks + 200) * BLOCK:
            arena.free(held.pop(choose.randrange(len(held))))
        held.append(arena.allocate(blocks * BLOCK))
        pieces.append(len(held[-1].runs))
    assert sum(pieces[-1000:]) < 4 * 1000
    arena.check_integrity(held)
