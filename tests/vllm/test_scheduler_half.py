"""The scheduler's half with vLLM's own requests and a real store."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import NewRequestData

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.vllm.metadata import SaveRequest
from kvstore_client.engines.vllm.scheduler import LoadLimits, SchedulerHalf
from kvstore_client.engines.vllm.worker_news import Learned, News
from kvstore_client.settings import FetchPolicy
from kvstore_codec.identity import CHUNK_TOKENS
from tests.vllm.processes import StoreProcess, free_port, prompt, until
from tests.vllm.scheduler_calls import BLOCK, SPEC, answer, continued, news, put, request, scheduled

pytestmark = pytest.mark.vllm


@pytest.fixture
def client(store: StoreProcess, tmp_path: Path) -> Iterator[KVStoreClient]:
    with connect(store.started["address"], cache_dir=tmp_path) as connected:
        yield connected


@pytest.fixture
def half(client: KVStoreClient) -> Iterator[SchedulerHalf]:
    made = SchedulerHalf(client, SPEC, BLOCK)
    yield made
    made.close()


def test_asking_again_begins_no_second_lookup(
    half: SchedulerHalf, client: KVStoreClient, store: StoreProcess
) -> None:
    tokens = prompt(700, seed=1)
    put(client, tokens)
    before = store.stats()
    asked = request(tokens)
    assert half.matched_tokens(asked, 0) == (None, False)
    assert answer(half, asked) == (512, True)
    assert [half.matched_tokens(asked, 0) for _ in range(10)] == [(512, True)] * 10
    assert half.matched_tokens(asked, 256) == (256, True)
    assert half.matched_tokens(asked, 512) == (0, False)
    after = store.stats()
    assert after["leases"] == 0
    assert after["hits"] == before["hits"], "a peek counts as no use"


@pytest.mark.parametrize(
    ("prompt_tokens", "loaded"), [(512, 384), (513, 512), (640, 512), (256, 128), (255, 0)]
)
def test_one_token_stays_to_be_computed(
    half: SchedulerHalf, client: KVStoreClient, prompt_tokens: int, loaded: int
) -> None:
    tokens = prompt(640, seed=2)
    put(client, tokens)
    assert answer(half, request(tokens[:prompt_tokens])) == (loaded, loaded > 0)


def test_a_prompt_whose_tokens_are_scored_is_computed_whole(
    half: SchedulerHalf, client: KVStoreClient
) -> None:
    tokens = prompt(900, seed=30)
    put(client, tokens[:512])
    asked = request(tokens, prompt_logprobs=1)
    assert answer(half, asked) == (0, False)
    saved: list[SaveRequest] = []
    until(lambda: bool(saved.extend(half.saves(scheduled(asked, list(range(8)), 900))) or saved))
    assert [save.first_chunk for save in saved] == [2], "what is stored is not saved again"


def test_a_store_out_of_reach_is_waited_for_with_a_bound(tmp_path: Path) -> None:
    client = connect(f"127.0.0.1:{free_port()}", cache_dir=tmp_path, lookup_timeout_s=0.5)
    half = SchedulerHalf(client, SPEC, BLOCK)
    asked = request(prompt(700, seed=3))
    assert answer(half, asked) == (0, False)
    assert half.saves(scheduled(asked, list(range(6)), 700)) == (), (
        "nothing is copied for a store that is away"
    )
    half.close()


def test_a_store_that_is_back_is_found_again_long_before_its_pause_ends(tmp_path: Path) -> None:
    """Its node listens on another port than before."""
    port, tokens = free_port(), prompt(700, seed=19)
    store = StoreProcess(tmp_path, port)
    with connect(store.started["address"], cache_dir=tmp_path, retry_after_s=600) as client:
        half = SchedulerHalf(client, SPEC, BLOCK)
        put(client, tokens)
        assert answer(half, request(tokens, "before")) == (512, True)
        store.kill()
        for number in range(5):
            assert answer(half, request(tokens, f"away {number}")) == (0, False)
        store = StoreProcess(tmp_path, port)
        with connect(store.started["address"], cache_dir=tmp_path) as another:
            put(another, tokens)
        asked = 0
        while answer(half, request(tokens, f"again {asked}")) == (0, False):
            asked += 1
            assert asked < 20, "one each quarter of a second: 5 s"
            time.sleep(0.25)
        half.close()
    store.close()


def test_loads_in_flight_are_bounded(client: KVStoreClient) -> None:
    half = SchedulerHalf(client, SPEC, BLOCK, LoadLimits(loads=1))
    tokens = prompt(700, seed=4)
    put(client, tokens)
    first, second = request(tokens, "first"), request(tokens, "second")
    assert answer(half, first) == (512, True)
    half.allocated(first, [1, 2, 3, 4], 512)
    (load,) = half.take_loads()
    assert (load.first_token, load.end_token, load.block_ids) == (0, 512, (1, 2, 3, 4))
    assert load.chunk_ids == tuple(client.chunk_ids(SPEC, tokens))
    assert half.take_loads() == ()
    assert answer(half, second) == (0, False), "it is computed when no load ends in time"
    half.received({"first"}, ())
    assert answer(half, second) == (512, True)
    half.close()


def test_a_load_that_failed_is_not_begun_again(half: SchedulerHalf, client: KVStoreClient) -> None:
    tokens = prompt(700, seed=5)
    put(client, tokens)
    asked = request(tokens)
    assert answer(half, asked, 256) == (256, True)
    half.allocated(asked, [7, 8, 9, 10], 256)
    half.allocated(asked, [7, 8, 9, 10, 11], 0)
    assert len(half.take_loads()) == 1
    half.received({"request"}, {9})
    assert half.matched_tokens(asked, 0) == (0, False)


def test_a_load_that_was_never_offered_is_begun_so_that_it_ends(
    half: SchedulerHalf, client: KVStoreClient
) -> None:
    asked = request(prompt(700, seed=11))
    half.allocated(asked, [3, 4, 5, 6], 512)
    (load,) = half.take_loads()
    assert (load.chunk_ids, load.first_token, load.end_token, load.block_ids) == ((), 0, 512, (3, 4, 5, 6))


@pytest.mark.parametrize(("failed", "first_saved"), [({8, 9}, 1), ({9}, 1), ({7, 8, 9}, 0)])
def test_what_a_failed_load_lacks_is_saved_when_it_is_computed(
    half: SchedulerHalf, client: KVStoreClient, failed: set[int], first_saved: int
) -> None:
    """The lookup has found it, but it is not there any more."""
    tokens = prompt(700, seed=12)
    put(client, tokens)
    asked = request(tokens)
    assert answer(half, asked, 128) == (384, True)
    half.allocated(asked, [6, 7, 8, 9, 10], 384)
    assert len(half.take_loads()) == 1
    half.received({"request"}, failed)
    (save,) = half.saves(scheduled(asked, [6, 7, 8, 9, 10, 11], 700))
    assert (save.first_chunk, save.chunks) == (first_saved, 2 - first_saved)


@pytest.fixture
def adaptive(store: StoreProcess, tmp_path: Path) -> Iterator[SchedulerHalf]:
    client = connect(store.started["address"], cache_dir=tmp_path, fetch_policy="adaptive")
    made = SchedulerHalf(client, SPEC, BLOCK)
    yield made
    made.close()


def test_what_is_sooner_computed_is_not_loaded(adaptive: SchedulerHalf, client: KVStoreClient) -> None:
    tokens = prompt(700, seed=21)
    put(client, tokens)
    asked = request(tokens)
    assert answer(adaptive, asked) == (512, True)
    adaptive.learn(news(1e4))
    assert answer(adaptive, asked) == (0, False)
    adaptive.learn(news(1e9))
    assert answer(adaptive, asked) == (512, True)


def test_a_slow_engine_loads_what_a_fast_one_computes(adaptive: SchedulerHalf, client: KVStoreClient) -> None:
    tokens = prompt(700, seed=22)
    put(client, tokens)
    adaptive.learn(news(8e6))
    asked = request(tokens)
    assert answer(adaptive, asked) == (512, True)
    step, computes = adaptive.scheduled(
        scheduled(request(prompt(700, seed=23), "other"), list(range(6)), 700)
    )
    assert not computes, "make_empty() counts no tokens"
    adaptive.learn(news(8e6, step))  # 700 tokens in no time at all
    assert answer(adaptive, asked) == (0, False)


def test_what_a_load_has_left_to_the_engine_is_not_stored_again(
    adaptive: SchedulerHalf, client: KVStoreClient
) -> None:
    """It is there, and the link is slow."""
    tokens = prompt(700, seed=25)
    put(client, tokens)
    asked = request(tokens)
    assert answer(adaptive, asked) == (512, True)
    adaptive.allocated(asked, [6, 7, 8, 9, 10], 512)
    assert len(adaptive.take_loads()) == 1
    adaptive.learn(News(0, Learned(), frozenset({"request"})))
    adaptive.received({"request"}, {8, 9})
    assert adaptive.saves(scheduled(asked, [6, 7, 8, 9, 10, 11], 700)) == ()


def test_the_policy_fixed_loads_whatever_it_takes(half: SchedulerHalf, client: KVStoreClient) -> None:
    assert client.settings.fetch.policy is FetchPolicy.FIXED, "that of all tests"
    tokens = prompt(700, seed=24)
    put(client, tokens)
    half.learn(news(1e4))
    assert answer(half, request(tokens)) == (512, True)


def test_new_chunks_are_saved_once_as_they_are_computed(half: SchedulerHalf) -> None:
    tokens = prompt(900, seed=6)
    asked = request(tokens)
    assert answer(half, asked) == (0, False)
    (save,) = half.saves(scheduled(asked, [5, 6, 7, 8], 400))
    assert (save.first_chunk, save.chunks, save.block_ids) == (0, 1, (5, 6))
    assert half.saves(continued(asked, [], 100, 400)) == ()
    (save,) = half.saves(continued(asked, [9, 3, 2, 1], 400, 500))
    assert (save.first_chunk, save.chunks, save.block_ids) == (1, 2, (7, 8, 9, 3))
    half.finished("request")
    again = request(tokens, "again")
    assert half.matched_tokens(again, 0) == (None, False)
    answer(half, again)
    assert half.saves(scheduled(again, list(range(8)), 900)) == (), "the same engine has handed them over"


def test_generated_tokens_are_saved_when_they_are_known(half: SchedulerHalf) -> None:
    asked = request(prompt(250, seed=7))
    assert answer(half, asked) == (0, False)
    assert half.saves(scheduled(asked, [1, 2], 250)) == ()
    asked.append_output_token_ids(list(range(2, 7)))
    assert half.saves(continued(asked, [3], 10, 250)) == (), "computed ahead, but not known yet"
    asked.append_output_token_ids(7)
    (save,) = half.saves(continued(asked, [], 1, 260))
    assert (save.chunks, save.block_ids) == (1, (1, 2))


def test_what_is_stored_is_not_saved_again(half: SchedulerHalf, client: KVStoreClient) -> None:
    tokens = prompt(700, seed=8)
    put(client, tokens[:256])
    asked = request(tokens)
    assert answer(half, asked, 256) == (0, False)
    (save,) = half.saves(scheduled(asked, [1, 2, 3, 4, 5, 6], 444, computed=256))
    assert (save.first_chunk, save.chunks, save.block_ids) == (1, 1, (3, 4))


def test_one_request_that_cannot_be_named_keeps_no_other_from_being_saved(
    half: SchedulerHalf, client: KVStoreClient
) -> None:
    broken = request(prompt(300, seed=14), "broken")
    broken.mm_features = [object()]
    with pytest.raises(AttributeError):
        half.matched_tokens(broken, 0)
    asked = request(prompt(300, seed=15))
    assert answer(half, asked) == (0, False)
    output = scheduled(asked, [3, 4, 5], 300)
    output.scheduled_new_reqs.insert(0, NewRequestData.from_request(broken, ([6, 7, 8],)))
    output.num_scheduled_tokens["broken"] = 300
    (save,) = half.saves(output)
    assert save.block_ids == (3, 4)
    assert client.metrics.snapshot()["miss_internal_error"] == 1
    assert half.matched_tokens(broken, 0) == (0, False)


def test_a_save_names_few_chunks_however_long_the_text_is(half: SchedulerHalf) -> None:
    chunks = 300
    asked = request(prompt(chunks * CHUNK_TOKENS, seed=16))
    assert answer(half, asked) == (0, False)
    blocks, most = list(range(2 * chunks)), 0
    for end in range(10, chunks + 1, 10):
        step = (end * CHUNK_TOKENS, 0) if end == 10 else (10 * CHUNK_TOKENS, (end - 10) * CHUNK_TOKENS)
        make = scheduled if end == 10 else continued
        (save,) = half.saves(make(asked, blocks[2 * (end - 10) : 2 * end], *step))
        assert (save.first_chunk, save.chunks) == (end - 10, 10)
        assert save.chunk_id(end - 1) == save.text[-1]
        assert save.text_begins + len(save.text) == end
        most = max(most, len(save.text))
    assert most < 80


def test_after_a_reset_nothing_from_before_is_found_or_stored(
    half: SchedulerHalf, client: KVStoreClient
) -> None:
    """The engine has other weights then, under the same names."""
    tokens = prompt(700, seed=17)
    put(client, tokens)
    under_way, waiting = request(tokens, "under way"), request(prompt(700, seed=18), "waiting")
    assert answer(half, under_way) == (512, True)
    assert half.matched_tokens(waiting, 0) == (None, False)
    half.forget()
    assert half.matched_tokens(under_way, 0) == half.matched_tokens(waiting, 0) == (0, False)
    assert half.saves(scheduled(under_way, list(range(6)), 700)) == ()
    later = request(tokens, "later")
    assert answer(half, later) == (0, False)
    (save,) = half.saves(scheduled(later, list(range(6)), 700))
    assert save.chunks == 2
    assert not set(save.text) & set(client.chunk_ids(SPEC, tokens))


def test_an_aborted_request_leaves_nothing(half: SchedulerHalf, client: KVStoreClient) -> None:
    for number in range(300):
        asked = request(prompt(300, seed=number), f"request {number}")
        half.matched_tokens(asked, 0)
        half.finished(asked.request_id)
    assert not half._tracked


def test_an_adapter_makes_a_request_ineligible(half: SchedulerHalf, client: KVStoreClient) -> None:
    tokens = prompt(700, seed=10)
    put(client, tokens)
    asked = request(tokens, lora_request=LoRARequest("adapter", 1, "/adapter"))
    assert half.matched_tokens(asked, 0) == (0, False)
    assert half.saves(scheduled(asked, list(range(6)), 700)) == ()
