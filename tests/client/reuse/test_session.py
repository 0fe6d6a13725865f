"""A ReuseSession over an engine that is not transformers: nothing in it knows which engine it serves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.pending import BypassedGeneration, PendingGeneration, ReusingGeneration
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.reuse.session import ReuseSession
from kvstore_codec.errors import InvalidTokensError
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.reuse.decoder import SPEC, VOCABULARY, Agreeing, Call, Decoder, Engine
from tests.damage import flip_bit

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENT = {"lookup_timeout_s": 20.0, "stall_timeout_s": 60.0, "fetch_timeout_s": 60.0, "retry_after_s": 0.0}


def text(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


PROMPT = text(3 * 256 + 40, seed=1)
SYSTEM, DOCUMENTS, QUESTION = text(256, 10), [text(512, 11), text(512, 12)], text(30, 13)
STORED_ORDER = (SYSTEM, *DOCUMENTS, QUESTION)
OTHER_ORDER = (SYSTEM, *reversed(DOCUMENTS), QUESTION)


@dataclass
class Worker:
    """One engine with one client."""

    client: KVStoreClient
    canary: Agreeing = field(default_factory=Agreeing)
    store: bool = True

    def __post_init__(self) -> None:
        self.decoder = Decoder()
        self.engine = Engine(self.decoder)
        self.session = ReuseSession(self.engine, self.client, self.canary, None, store=self.store)

    def call(self, *parts: torch.Tensor, **options: Any) -> Call:
        """A prompt of `parts`; its segments, if there are several."""
        segments = [len(part) for part in parts] if len(parts) > 1 else None
        return Call(self.decoder, torch.cat(parts), segments, **options)

    def answer(self, *parts: torch.Tensor, **options: Any) -> list[int]:
        answer: list[int] = self.session.answer(self.call(*parts, **options))
        self.client.store.flush()
        return answer

    def begin(self, *parts: torch.Tensor) -> PendingGeneration:
        return self.session.begin(self.call(*parts))

    def plain(self, *parts: torch.Tensor) -> list[int]:
        answer: list[int] = self.call(*parts).pass_through()
        return answer

    @property
    def report(self) -> GenerationReport:
        return self.session.last_report

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)


@pytest.fixture
def worker(cluster: ServedCluster) -> Iterator[Worker]:
    with connect(cluster.address, **PATIENT) as client:
        yield Worker(client)
        cluster.check_nothing_is_held()


@pytest.fixture
def other(cluster: ServedCluster) -> Iterator[Worker]:
    """Another worker of the same model."""
    with connect(cluster.address, **PATIENT) as client:
        yield Worker(client)


def test_what_one_session_stores_another_reuses(
    worker: Worker, other: Worker, cluster: ServedCluster
) -> None:
    assert worker.answer(PROMPT) == worker.plain(PROMPT)
    assert worker.report.why_not == "not stored"
    assert cluster.stored_chunks() == 3
    assert other.answer(PROMPT) == worker.plain(PROMPT)
    assert other.report.reused_tokens == 768
    assert other.report.why_not is None
    assert other.counted("tokens_matched") == 768
    assert cluster.stored_chunks() == 3


def test_a_part_of_the_prefix_is_enough_for_an_answer(worker: Worker, other: Worker) -> None:
    prompt = torch.cat((text(4 * 256, seed=1), text(40, seed=2)))
    worker.answer(prompt, budget=1.0)
    expected = other.answer(prompt)
    assert other.answer(prompt, budget=1.0) == expected
    assert other.report.reprefill is not None
    assert other.report.reprefill.attended_tokens == 1024
    other.answer(prompt, budget=0.25)
    assert other.report.reprefill.sets[0][0] == 0
    assert other.report.reprefill.sets[0][-1] == 15
    assert len(other.report.reprefill.sets[0]) == 4
    assert other.counted("frames_missing") == 0


def test_generated_text_is_stored_with_its_prompt(worker: Worker, cluster: ServedCluster) -> None:
    answer = worker.answer(PROMPT[:250], new_tokens=8)
    assert cluster.stored_chunks() == 1
    longer = torch.cat((PROMPT[:250], torch.tensor(answer), text(30, 3)))
    assert worker.answer(longer) == worker.plain(longer)
    assert worker.report.reused_tokens == 256


def test_a_chunk_that_is_missing_in_the_middle_is_computed(
    worker: Worker, other: Worker, cluster: ServedCluster
) -> None:
    worker.answer(PROMPT)
    chunk_id = worker.client.chunk_ids(SPEC, PROMPT.tolist())[1]
    with cluster.nodes[0].open(chunk_id, "exact-zstd") as reader:
        flip_bit(next(reader.pieces(0, 1, 1 << 20))[0])
    assert other.answer(PROMPT) == worker.plain(PROMPT)
    assert other.engine.computed_tokens == 256
    assert other.report.reused_tokens == 512
    assert other.report.fetch is not None
    assert dict(other.report.fetch.missing) == {1: "checksum"}


def test_what_does_not_come_by_the_deadline_is_computed(tmp_path: Path) -> None:
    with served_cluster(tmp_path) as cluster:
        with connect(cluster.address, **PATIENT) as client:
            Worker(client).answer(PROMPT)
        endpoint = cluster.servers[0].address
        late = PATIENT | {"fetch_timeout_s": 0.3}
        with (
            ShapedLink(endpoint, bandwidth_bps=10e9) as link,
            connect(cluster.address, routes={endpoint: link.address}, **late) as client,
        ):
            slow = Worker(client, store=False)
            begun = slow.begin(PROMPT)
            assert isinstance(begun, ReusingGeneration)
            begun.cancel()
            link.set_bandwidth(1e5)
            assert slow.answer(PROMPT) == slow.plain(PROMPT)
            assert slow.report.fetch is not None
            assert "timeout" in slow.report.fetch.missing.values()
            assert str(slow.report.why_not).startswith("not fetched: timeout")
            link.set_bandwidth(10e9)
        cluster.check_nothing_is_held()


def test_documents_are_reused_in_another_order(worker: Worker, other: Worker, cluster: ServedCluster) -> None:
    assert worker.answer(*STORED_ORDER) == worker.plain(*STORED_ORDER)
    assert cluster.stored_chunks() == 5
    assert other.answer(*STORED_ORDER) == worker.plain(*STORED_ORDER)
    assert other.report.exact_tokens == 5 * 256
    assert len(other.answer(*OTHER_ORDER, recompute=Recompute(ratio=0.2))) == 4
    assert other.report.approximate_tokens == 4 * 256
    assert other.report.recomputed_tokens == int(0.2 * 4 * 256)
    assert cluster.stored_chunks() == 5


def test_a_question_over_exact_documents_leaves_the_model_as_without_reuse(worker: Worker) -> None:
    worker.answer(*STORED_ORDER)
    states = worker.session.question_states(worker.call(*STORED_ORDER))
    whole = worker.call(*STORED_ORDER, new_tokens=1)
    seen: list[torch.Tensor] = []
    forward = worker.decoder.forward
    worker.decoder.forward = lambda *arguments: (seen.append(forward(*arguments)), seen[-1])[1]  # type: ignore[method-assign]
    whole.pass_through()
    torch.testing.assert_close(states, seen[0][:, -len(QUESTION) :], rtol=1e-4, atol=1e-4)


def test_segments_that_do_not_make_the_prompt_are_refused(worker: Worker) -> None:
    for wrong in ([1], [*map(len, STORED_ORDER), 1], []):
        call = worker.call(*STORED_ORDER)
        call.segments = wrong
        with pytest.raises(InvalidTokensError):
            worker.session.begin(call)
        with pytest.raises(InvalidTokensError):
            worker.session.is_stored(call)


@pytest.mark.parametrize("parts", [(PROMPT,), OTHER_ORDER], ids=["prefix", "segments"])
def test_a_cancelled_call_holds_nothing(
    worker: Worker, cluster: ServedCluster, parts: tuple[torch.Tensor, ...]
) -> None:
    worker.answer(PROMPT)
    worker.answer(*STORED_ORDER)
    begun = worker.begin(*parts)
    assert begun.buffer_bytes >= sum(map(len, parts)) * SPEC.kv_bytes_per_token
    begun.cancel()
    begun.cancel()
    assert begun.buffer_bytes == 0
    assert begun.remaining_s() == 0
    cluster.check_nothing_is_held()
    first, second = worker.begin(*parts), worker.begin(*parts)
    assert isinstance(first, ReusingGeneration)
    assert isinstance(second, ReusingGeneration)
    assert first.incoming is not None
    assert second.incoming is not None
    assert first.incoming.buffers.memory.data_ptr() != second.incoming.buffers.memory.data_ptr()
    second.cancel()
    assert len(worker.session.finish(first)) == 4
    assert worker.report.reused_tokens


def test_a_model_that_changes_between_the_halves_is_begun_again(worker: Worker) -> None:
    worker.answer(PROMPT)
    begun = worker.begin(PROMPT)
    worker.decoder.load(seed=2)
    assert worker.session.finish(begun) == worker.plain(PROMPT)
    assert worker.report.reused_tokens == 0
    assert [spec.weights_digest[0] for spec in worker.canary.watched] == [0, 2]


def test_a_call_that_became_one_without_reuse_is_passed_through(worker: Worker) -> None:
    worker.answer(PROMPT)
    call = worker.call(PROMPT)
    begun = worker.session.begin(call)
    call.bypassed = "training"
    assert worker.session.finish(begun) == worker.plain(PROMPT)
    assert worker.report.bypassed == "training"
    assert call.passes == 0


def test_a_bypassed_call_is_counted_and_runs_alone(worker: Worker) -> None:
    begun = worker.session.begin(worker.call(PROMPT, bypassed="batch"))
    assert isinstance(begun, BypassedGeneration)
    called: list[None] = []
    begun.on_ready(lambda: called.append(None))
    assert called == [None]
    assert worker.session.finish(begun) == worker.plain(PROMPT)
    assert worker.report.why_not == "bypassed: batch"
    assert worker.report.prompt_tokens == len(PROMPT)
    assert worker.counted("miss_bypass_batch") == 1


@pytest.mark.parametrize("final", [False, True])
def test_a_model_that_its_canary_refuses_neither_reads_nor_stores(
    worker: Worker, other: Worker, cluster: ServedCluster, final: bool
) -> None:
    worker.answer(PROMPT)
    other.canary.reason = "canary_differs" if final else "canary_pending"
    longer = torch.cat((PROMPT, text(300, 4)))
    assert not other.session.is_stored(other.call(longer))
    assert other.answer(longer) == worker.plain(longer)
    assert other.report.why_not == f"{other.canary.reason}: as the test says"
    assert other.report.bypassed == ("canary_differs" if final else None)
    assert other.canary.counted == ([] if final else ["canary_pending", "store_canary_pending"])
    assert cluster.stored_chunks() == 3


@pytest.mark.parametrize("parts", [(PROMPT,), STORED_ORDER], ids=["prefix", "segments"])
def test_an_exception_of_the_engine_leaves_what_was_computed(
    worker: Worker, cluster: ServedCluster, parts: tuple[torch.Tensor, ...]
) -> None:
    error = BrokenPipeError("the reader has gone")

    def gone(_: int) -> None:
        raise error

    with pytest.raises(BrokenPipeError) as raised:
        worker.answer(*parts, see=gone)
    assert raised.value is error
    worker.client.store.flush()
    assert cluster.stored_chunks() == sum(len(part) // 256 for part in parts)
    assert worker.answer(*parts) == worker.plain(*parts)
    assert worker.report.reused_tokens


def test_looking_whether_anything_is_stored_counts_no_use(worker: Worker, other: Worker) -> None:
    for parts in ((PROMPT,), STORED_ORDER):
        assert not other.session.is_stored(other.call(*parts))
        worker.answer(*parts)
        assert other.session.is_stored(other.call(*parts))
    assert other.counted("tokens_matched") == 0


def test_a_session_that_stores_nothing_reads(worker: Worker, cluster: ServedCluster) -> None:
    worker.session.storing.active = False
    worker.answer(PROMPT)
    assert cluster.stored_chunks() == 0
    worker.session.storing.active = True
    worker.answer(PROMPT)
    assert cluster.stored_chunks() == 3
