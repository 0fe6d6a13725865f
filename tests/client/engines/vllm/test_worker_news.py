"""When the worker's half tells the scheduler's half what it has learned."""

import pytest

from kvstore_client.engines.vllm.worker_news import News, Newsroom
from kvstore_client.planning import CodecCost, Costs, Links, PrefillCost, Profile


@pytest.fixture
def links() -> Links:
    links = Links(lambda: 0.0)
    for _ in range(60):
        links.observe("a", 5_000_000, 0.005)
    links.first_byte("a", 0.02)
    return links


@pytest.fixture
def newsroom(links: Links) -> Newsroom:
    codecs = {"exact-zstd": CodecCost(1e-5, 0.0)}
    return Newsroom(links, Costs(Profile(codecs, PrefillCost(0.0, 1e-3, 0.0), 1.0, 1)))


def test_the_news_are_the_speeds_of_links_and_decoders(newsroom: Newsroom) -> None:
    news = newsroom.after(7, computes=True)
    assert news is not None
    assert news.step == 7
    assert news.learned is not None
    assert news.learned.links["a"] == (pytest.approx(1e9, rel=0.01), 0.02)
    assert news.learned.codecs == {"exact-zstd": CodecCost(1e-5, 0.0)}


def test_speeds_are_told_again_when_they_have_changed(links: Links, newsroom: Newsroom) -> None:
    assert newsroom.after(1, computes=True) is not None
    assert newsroom.after(2, computes=True) == News(2)
    links.first_byte("a", 0.04)
    news = newsroom.after(3, computes=True)
    assert news is not None
    assert news.learned is not None
    assert news.learned.links["a"][1] > 0.02
    assert newsroom.after(4, computes=True) == News(4)


def test_each_step_that_computes_is_told_and_few_others(newsroom: Newsroom) -> None:
    assert newsroom.after(1, computes=False) is not None
    assert newsroom.after(2, computes=False) is None
    assert newsroom.after(3, computes=True) is not None
    assert newsroom.after(4, computes=True) is not None


def test_the_end_of_a_load_that_was_overtaken_is_told_at_once(newsroom: Newsroom) -> None:
    """The scheduler's half has to know it when it hears of the load's end."""
    newsroom.after(1, computes=True)
    news = newsroom.after(2, frozenset({"request"}), computes=False)
    assert news is not None
    assert news.overtaken == {"request"}
