"""Requests that begin with the canary's probe are recognised, and followed until the engine has computed it."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request

from kvstore_client.engines.vllm.canary import engine_probe
from kvstore_client.engines.vllm.probe import probe_prompt
from kvstore_client.engines.vllm.probe_watch import ProbeWatch

pytestmark = pytest.mark.vllm

PROBE = engine_probe(512)


def request(tokens: list[int], **options: Any) -> Request:
    return Request("probe", tokens, SamplingParams(max_tokens=8), None, **options)


def begun(asked: Request, blocks: list[int], tokens: int, computed: int = 0) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    asked.num_computed_tokens = computed
    output.scheduled_new_reqs = [NewRequestData.from_request(asked, (blocks,))]
    output.num_scheduled_tokens = {asked.request_id: tokens}
    return output


def continued(blocks: list[int], tokens: int, computed: int, *, resumed: bool = False) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData(
        ["probe"], {"probe"} if resumed else set(), [], {}, [(blocks,) if blocks else None], [computed], [0]
    )
    output.num_scheduled_tokens = {"probe": tokens}
    return output


@pytest.fixture
def watch() -> ProbeWatch:
    return ProbeWatch(PROBE, 128)


def test_only_the_probe_itself_is_one(watch: ProbeWatch) -> None:
    tokens = probe_prompt(512)
    assert watch.watch(request(tokens))
    assert watch.watch(request(tokens, cache_salt="a")), "KV does not depend on the salt"
    assert watch.watch(request([*tokens, 5, 6]))
    assert not watch.watch(request(tokens[:-1])), "its last token would have to be computed again"
    assert not watch.watch(request([*tokens[:255], tokens[255] ^ 1, 7]))
    assert not watch.watch(request(tokens, lora_request=LoRARequest("adapter", 1, "/adapter")))


def test_blocks_are_told_once_when_the_whole_probe_is_computed(watch: ProbeWatch) -> None:
    asked = request(probe_prompt(512))
    for _ in range(2):
        assert watch.watch(asked)
    assert watch.computed(begun(asked, [9], 100)) == ()
    assert watch.computed(continued([4, 5], 150, 100)) == ()
    assert watch.computed(continued([], 7, 250)) == (9, 4)
    assert watch.computed(continued([], 1, 257)) == ()


def test_a_preempted_probe_has_other_blocks(watch: ProbeWatch) -> None:
    asked = request(probe_prompt(512))
    watch.watch(asked)
    assert watch.computed(begun(asked, [9], 100)) == ()
    assert watch.computed(continued([1, 2, 3], 257, 0, resumed=True)) == (1, 2)


def test_other_requests_and_aborted_probes_are_not_followed(watch: ProbeWatch) -> None:
    asked = request(probe_prompt(512))
    assert watch.computed(begun(asked, [9, 8, 7], 257)) == ()
    watch.watch(asked)
    watch.finished("probe")
    assert watch.computed(begun(asked, [9, 8, 7], 257)) == ()


def test_an_engine_with_other_weights_is_not_compared(watch: ProbeWatch) -> None:
    asked = request(probe_prompt(512))
    watch.watch(asked)
    watch.stop()
    assert watch.computed(begun(asked, [9, 8, 7], 257)) == ()
    assert not watch.watch(asked)
