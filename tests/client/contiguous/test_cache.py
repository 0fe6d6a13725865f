"""Which frames the cache keeps, within its limits, also when many threads use it."""

import random
import threading

import pytest
import torch

from kvstore_client.contiguous.attention_scores import AttentionScores
from kvstore_client.contiguous.cache import FrameCache
from kvstore_client.contiguous.cache_level import CacheLevel
from kvstore_client.contiguous.grid import FrameKey

FRAME_BYTES = 400


def key(number: int) -> FrameKey:
    return FrameKey(b"prefix", "exact-zstd", number, number)


def frame(number: int = 0) -> torch.Tensor:
    return torch.full((FRAME_BYTES // 4,), float(number))


def use(cache: FrameCache, *numbers: int, attention: float = 0.1) -> None:
    cache.used({key(n): frame(n) for n in numbers}, {key(n): attention for n in numbers})
    cache.check_integrity()


def cached(cache: FrameCache, numbers: range) -> list[int]:
    return [number for number in numbers if cache.get([key(number)])]


def test_a_score_is_attention_times_loads() -> None:
    scores = AttentionScores()
    assert scores.of(key(0)) == 0
    assert scores.used(key(0), 0.25) == pytest.approx(0.25)
    assert scores.used(key(0), 0.5) == pytest.approx(0.75 * 2)


def test_the_longest_unused_score_is_forgotten() -> None:
    scores = AttentionScores(limit=2)
    for number in (0, 1, 0, 2):
        scores.used(key(number), 0.5)
    assert len(scores) == 2
    assert scores.of(key(1)) == 0
    assert scores.of(key(0)) > scores.of(key(2)) > 0


def test_the_least_attended_frame_leaves() -> None:
    cache = FrameCache(3 * FRAME_BYTES)
    use(cache, 0, 1, attention=0.4)
    use(cache, 2, attention=0.2)
    use(cache, 3, attention=0.3)
    assert cached(cache, range(4)) == [0, 1, 3]
    assert cache.size_bytes == 3 * FRAME_BYTES
    assert torch.equal(cache.get([key(3)])[key(3)], frame(3))


def test_a_frame_that_is_used_often_stays() -> None:
    cache = FrameCache(2 * FRAME_BYTES)
    for number in (0, 0, 0, 1):
        use(cache, number, attention=0.1)
    use(cache, 2, attention=0.3)
    assert cached(cache, range(3)) == [0, 2]


def test_a_text_that_nobody_asks_about_leaves_in_the_end() -> None:
    cache = FrameCache(4 * FRAME_BYTES)
    for _ in range(5):
        use(cache, 0, 1, 2, 3, attention=0.2)
    for number in range(100, 400):
        use(cache, number, attention=0.1)
    assert cached(cache, range(4)) == []


def test_a_frame_beyond_the_limit_is_not_kept() -> None:
    cache = FrameCache(FRAME_BYTES - 1)
    use(cache, 0, attention=1.0)
    assert cached(cache, range(1)) == []
    assert cache.size_bytes == 0


def test_a_level_reports_what_leaves_it_lowest_first() -> None:
    level = CacheLevel(2 * FRAME_BYTES)
    assert level.put(key(0), frame(0), 3.0) == []
    assert level.put(key(1), frame(1), 1.0) == []
    level.reprioritise(key(1), 4.0)
    left = level.put(key(2), torch.zeros(2 * FRAME_BYTES // 4), 9.0)
    assert [name for name, _, _ in left] == [key(0), key(1)]
    level.check_integrity()
    assert len(level) == 1


def test_outdated_entries_do_not_pile_up() -> None:
    level = CacheLevel(4 * FRAME_BYTES)
    for step in range(200):
        level.put(key(step % 4), frame(), float(step))
        level.reprioritise(key((step + 1) % 4), step + 0.5)
        level.check_integrity()


def test_many_threads_share_a_cache() -> None:
    cache = FrameCache(20 * FRAME_BYTES)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                numbers = rng.sample(range(60), 5)
                for name, tensor in cache.get(map(key, numbers)).items():
                    assert float(tensor[0]) == name.frame
                cache.used({key(n): frame(n) for n in numbers}, {key(n): rng.random() for n in numbers})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache.check_integrity()
    assert cache.size_bytes <= 20 * FRAME_BYTES
    cache.clear()
    assert cache.size_bytes == 0
