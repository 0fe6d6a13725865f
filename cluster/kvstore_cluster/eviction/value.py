"""The default eviction policy: evicts the chunk whose expected saving per byte is least."""

import heapq
import math
from array import array
from collections.abc import Iterator

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT, Links, SlotQueue, grow
from kvstore_cluster.eviction.ghosts import GhostTable
from kvstore_cluster.eviction.half_life import HalfLife

_STEPS = 16  # of the logarithms in columns, per doubling
_STEPS_PER_QUEUE = 4
_WIDEST = 32 * _STEPS
_MOST_FREQUENCY = 255
_FULL_SCORE = 255
_FADE = 2  # half-lives after which the weight of past uses is halved
_SAME_USE_SHARE = 32
_GHOSTS_PER_SLOT = 2 / 3


def _steps(value: float) -> int:
    return round(_STEPS * math.log2(value))


# `_ONE_MORE[f - _FADED]` is the log2 of uses after one more use, for a log2 of `f` before. Past uses below `_FADED`
# do not count beside one use.
_FADED = -6 * _STEPS
_ONE_MORE = [
    min(_MOST_FREQUENCY, _steps(1 + 2 ** (faded / _STEPS))) for faded in range(_FADED, _MOST_FREQUENCY + 1)
]
_SCORE_STEPS = [_steps(1 + score / _FULL_SCORE) for score in range(_FULL_SCORE + 1)]


class ValueAware(EvictionPolicy):
    """Evicts the chunk with the least

        cost / size_bytes  x  (1 + attention score)  x  uses  x  2 ** -(age / half-life)

    The first factor is the computation saved per byte. The second and third are the score x frequency of ContiguousKV
    (arXiv 2601.13631). The last two are frequency with ageing (LRFU, Lee et al. 2001). The score is the attention that
    clients reported for the chunk, or 0. The half-life is learned: it is the median interval between the first and
    second use of a chunk, including chunks that were evicted in between. Age and half-life are counted in uses.

    The half-life times the logarithm of the value is `time of last use + half-life x log2(other factors)`, up to a term
    that is the same for all chunks. The policy has one queue for each quarter of a doubling of the other factors. Each
    queue is in order of last use, so the best victim is at the head of one of the queues. A use takes constant time,
    and a victim takes one comparison per queue.

    A use that follows the previous one before 1/32 of the tier was used refreshes the chunk but does not count as
    another use: a read follows its lookup, and no policy would have evicted the chunk in between. About 40 bytes per
    chunk.

    A chunk is worth nothing without the chunks before it in its prompt, so differences in compressed size must not
    decide the order within a prompt. Costs per byte within a factor of two therefore count as equal.
    """

    def __init__(self) -> None:
        self._links = Links()
        self._queues: dict[int, SlotQueue] = {}
        self._last_uses = array("Q")
        self._identities = array("Q")
        self._merits = array("h")  # log2 of (cost per byte x (1 + score))
        self._frequencies = array("B")  # log2 of uses
        self._scores = array("B")
        self._known_savings: list[int] = []
        self._ghosts = GhostTable()
        self._half_life = HalfLife()
        self._now = 0
        self._count = 0

    @property
    def half_life_uses(self) -> float:
        """The learned half-life, in uses of any chunk."""
        return self._half_life.uses

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        if slot >= len(self._scores):
            self._grow(slot)
        self._now += 1
        ghost = self._ghosts.take(identity)
        self._identities[slot] = identity
        self._merits[slot] = self._savings(max(-_WIDEST, min(_WIDEST, _steps(cost / size_bytes))))
        self._scores[slot] = 0
        self._frequencies[slot] = 0 if ghost is None else self._used_again(ghost[1], self._now - ghost[0])
        self._last_uses[slot] = self._now
        self._count += 1
        self._queue(slot).push(slot)

    def touch(self, slot: int) -> None:
        self._now = now = self._now + 1
        queue = self._queue(slot)
        queue.remove(slot)
        age_uses = now - self._last_uses[slot]
        self._last_uses[slot] = now
        if age_uses * _SAME_USE_SHARE > self._count:
            self._frequencies[slot] = self._used_again(self._frequencies[slot], age_uses)
            queue = self._queue(slot)
        queue.push(slot)

    def follow(self, slot: int, before: int) -> None:
        queue = self._queue(slot)
        if queue is self._queue(before):
            queue.remove(slot)
            self._last_uses[slot] = self._last_uses[before]
            queue.insert_before(slot, before)

    def postpone(self, slot: int) -> None:
        queue = self._queue(slot)
        queue.remove(slot)
        self._last_uses[slot] = self._now
        queue.push(slot)

    def report(self, slot: int, score: float) -> None:
        """Updates the score to the mean of the old score and the report: an exponential moving average."""
        self._queue(slot).remove(slot)
        known = self._scores[slot]
        self._scores[slot] = score_now = (known + round(_FULL_SCORE * max(0.0, min(1.0, score))) + 1) // 2
        self._merits[slot] += _SCORE_STEPS[score_now] - _SCORE_STEPS[known]
        self._last_uses[slot] = self._now  # the chunk was just used, and its queue must stay in order of use
        self._queue(slot).push(slot)

    def remove(self, slot: int, *, evicted: bool) -> None:
        self._queue(slot).remove(slot)
        self._count -= 1
        if evicted:
            self._ghosts.put(self._identities[slot], self._last_uses[slot], self._frequencies[slot])

    def victims(self) -> Iterator[int]:
        step_uses = self._half_life.uses * _STEPS_PER_QUEUE / _STEPS
        heads = [
            (self._last_uses[queue.oldest] + step_uses * level, queue.oldest, level)
            for level, queue in self._queues.items()
            if queue.oldest != NO_SLOT
        ]
        heapq.heapify(heads)
        while heads:
            _, slot, level = heads[0]
            yield slot
            following = self._links.newer[slot]
            if following == NO_SLOT:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (self._last_uses[following] + step_uses * level, following, level))

    def __len__(self) -> int:
        return self._count

    def _grow(self, slot: int) -> None:
        self._links.grow(slot)
        for column in (self._last_uses, self._identities, self._merits, self._frequencies, self._scores):
            grow(column, slot)
        self._ghosts.reserve(int(_GHOSTS_PER_SLOT * len(self._scores)))

    def _savings(self, steps: int) -> int:
        """Rounds to a known value that is at most a doubling away. Adds `steps` to the known values when there is
        none."""
        nearest = min(self._known_savings, key=lambda known: abs(known - steps), default=None)
        if nearest is not None and abs(nearest - steps) <= _STEPS:
            return nearest
        self._known_savings.append(steps)  # at most one per doubling of the value range
        return steps

    def _used_again(self, frequency: int, age_uses: int) -> int:
        """The new frequency, as log2 in steps, of a chunk that is used again after `age_uses`."""
        if frequency == 0:
            self._half_life.learn(age_uses)
        faded = frequency - int(age_uses / self._half_life.uses * (_STEPS / _FADE))
        return _ONE_MORE[max(faded, _FADED) - _FADED]

    def _queue(self, slot: int) -> SlotQueue:
        """The queue that the slot belongs in. Empty queues are kept: they are few, and soon used again."""
        level = (self._merits[slot] + self._frequencies[slot]) // _STEPS_PER_QUEUE
        queue = self._queues.get(level)
        if queue is None:
            queue = self._queues[level] = SlotQueue(self._links)
        return queue
