"""Descriptions of stored chunks by vLLM's own block hashes."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash
from vllm.v1.request import Request

from kvstore_client.engines.vllm.events import EventQueue, StoredEvents, stored_events
from tests.vllm.processes import prompt

pytestmark = pytest.mark.vllm

BLOCK = 64


def request(tokens: list[int], **options: Any) -> Request:
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request("request", tokens, SamplingParams(max_tokens=8), None, block_hasher=hasher, **options)


def test_a_chunk_is_described_by_its_blocks() -> None:
    tokens = prompt(600, seed=1)
    asked = request(tokens)
    hashes = [maybe_convert_block_hash(found) for found in asked.block_hashes]
    (event,) = stored_events(asked, range(1, 2), BLOCK)
    assert event.block_hashes == hashes[4:8]
    assert event.parent_block_hash == hashes[3]
    assert event.token_ids == tokens[256:512]
    assert stored_events(asked, range(1, 3), BLOCK) == (), "the third chunk is not full"


@pytest.mark.parametrize(
    "more",
    [
        {"cache_salt": "a"},
        {"prompt_embeds": torch.ones(600, 8)},
        {"lora_request": LoRARequest("adapter", 1, "/adapter")},
    ],
    ids=lambda more: next(iter(more)),
)
def test_kv_that_depends_on_more_than_tokens_is_not_published(more: dict[str, Any]) -> None:
    assert stored_events(request(prompt(600, seed=1), **more), range(2), BLOCK) == ()


@pytest.mark.parametrize(("stored", "published"), [(2, 2), (1, 0), (0, 0)])
def test_a_chunk_is_published_when_its_whole_batch_is_stored(stored: int, published: int) -> None:
    events = stored_events(request(prompt(600, seed=1)), range(2), BLOCK)
    queue, put = EventQueue(), Future[int]()
    queue.add_when_stored(put, events)
    assert queue.take() == []
    put.set_result(stored)
    assert queue.take() == list(events[:published])
    assert queue.take() == []


def test_puts_that_end_otherwise_publish_nothing() -> None:
    events = stored_events(request(prompt(600, seed=1)), range(2), BLOCK)
    queue, dropped, failed = EventQueue(), Future[int](), Future[int]()
    for put in (dropped, failed):
        queue.add_when_stored(put, events)
    dropped.cancel()
    failed.set_exception(RuntimeError("no thread left"))
    assert queue.take() == []


def test_events_that_nobody_takes_do_not_pile_up() -> None:
    queue = EventQueue()
    for number in range(5000):
        queue.add([number])
    taken = queue.take()
    assert len(taken) == 1024
    assert taken[-1] == 4999


def test_events_of_a_worker_are_gathered() -> None:
    events = StoredEvents([1])
    events.merge(StoredEvents([2]))
    assert events.aggregate().get_all_events() == [1, 2]
    events.clear_events()
    assert events.get_all_events() == []
