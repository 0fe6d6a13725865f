"""What vLLM's scheduler asks and tells the scheduler's half of the connector, with vLLM's own requests."""

import time
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.vllm.scheduler import SchedulerHalf
from kvstore_client.engines.vllm.worker_news import Learned, News
from kvstore_client.new_chunk import NewChunk
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import KVDtype, ModelSpec

SPEC = ModelSpec("tiny", bytes(32), 2, 2, 16, KVDtype.FLOAT32, None, numerics=(("keys", "after RoPE"),))
BLOCK = 128


def request(
    tokens: list[int], name: str = "request", prompt_logprobs: int | None = None, **options: Any
) -> Request:
    sampling = SamplingParams(max_tokens=8, prompt_logprobs=prompt_logprobs)
    return Request(name, tokens, sampling, None, **options)


def put(client: KVStoreClient, tokens: list[int]) -> None:
    """Store random KV, about 120 KB a chunk."""
    shape = (SPEC.layers, SPEC.kv_heads, CHUNK_TOKENS, SPEC.head_dim)
    kv = torch.randn(shape), torch.randn(shape)
    chunks = [NewChunk(chunk_id, lambda: kv) for chunk_id in client.chunk_ids(SPEC, tokens)]
    assert client.store.put(SPEC, chunks).result() == len(chunks)


def answer(half: SchedulerHalf, asked: Request, computed: int = 0) -> tuple[int | None, bool]:
    """What the scheduler is told in the end."""
    deadline = time.monotonic() + 60
    while (told := half.matched_tokens(asked, computed))[0] is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return told


def scheduled(asked: Request, blocks: list[int], tokens: int, computed: int = 0) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    asked.num_computed_tokens = computed
    output.scheduled_new_reqs = [NewRequestData.from_request(asked, (blocks,))]
    output.num_scheduled_tokens = {asked.request_id: tokens}
    return output


def continued(asked: Request, blocks: list[int], tokens: int, computed: int) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData(
        [asked.request_id], set(), [], {}, [(blocks,) if blocks else None], [computed], [0]
    )
    output.num_scheduled_tokens = {asked.request_id: tokens}
    return output


def news(bandwidth_bps: float, step: int = 0) -> News:
    """The worker has met a link."""
    return News(step, Learned({"another node": (bandwidth_bps / 8, 0.0)}))
