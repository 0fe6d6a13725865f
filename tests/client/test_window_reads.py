"""In layers with a sliding window, a fetch reads the windows before what the engine computes, whatever that comes to
be."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.ledger import FetchLedger
from kvstore_client.fetch.wanted import WantedFrames
from kvstore_client.match import StoredChunk, Variant
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import COMPUTE
from kvstore_client.timeline import Timeline
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from tests.client.chunks import MEMBER, SPEC, ids, random_kv, stored_chunks

WINDOWS = (100, 100, 100, 100, None, None)
"""Of the layers of the chunks' first period, and of those of the second."""
SLIDING, FULL = 0, 4


def fetch_of(chunks: int, stall_s: float = 120.0) -> tuple[FetchState, list[ReadTask]]:
    fetch_state = FetchState(
        stored_chunks(chunks),
        layers=SPEC.layers,
        deadline_s=120.0,
        stall_s=stall_s,
        timeline=Timeline(),
        windows=WINDOWS,
    )
    return fetch_state, fetch_state.next_reads(MEMBER, 1 << 40)


def deliver(fetch_state: FetchState, *tasks: ReadTask) -> None:
    for task in tasks:
        assert fetch_state.begin_decode(task)
        fetch_state.deliver(task)


def places(tasks: list[ReadTask]) -> list[tuple[int, int, int]]:
    return [(task.layers.start, task.tokens.start, task.tokens.stop) for task in tasks]


def test_only_the_window_before_the_first_computed_token_is_read() -> None:
    fetch_state, tasks = fetch_of(3)
    assert places(tasks) == [(SLIDING, 640, 768), (FULL, 0, 256), (FULL, 256, 512), (FULL, 512, 768)]
    deliver(fetch_state, tasks[0])
    assert fetch_state.wait_layer(3)
    deliver(fetch_state, *tasks[1:])
    assert fetch_state.wait_layer(5)
    report = fetch_state.report()
    assert report.complete
    assert (report.delivered, report.fetched) == (3, 3)
    assert fetch_state.next_reads(MEMBER, 1 << 40) == []
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 768


def test_the_window_before_a_lost_chunk_is_read_as_well() -> None:
    fetch_state, tasks = fetch_of(3)
    deliver(fetch_state, tasks[0], tasks[1], tasks[3])
    more: list[list[ReadTask]] = []
    reader = threading.Thread(target=lambda: more.append(fetch_state.next_reads(MEMBER, 1 << 40)))
    reader.start()  # it waits: the last chunk may still be lost
    fetch_state.fail_chunks([tasks[2]], MissReason.CHECKSUM)
    reader.join(30)
    assert not fetch_state.wait_layer(0)
    assert places(more[0]) == [(SLIDING, 128, 256)]
    deliver(fetch_state, *more[0])
    assert fetch_state.next_to_compute() == (1, 2)
    fetch_state.computed(1, 2)
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 768
    assert fetch_state.wait_layer(5)
    report = fetch_state.report()
    assert (report.fetched, report.computed, report.missing) == (2, 0, {1: "checksum"})


def test_the_last_pass_has_its_window_when_chunks_at_the_end_are_lost() -> None:
    fetch_state, tasks = fetch_of(3)
    fetch_state.fail_chunks([tasks[0]], MissReason.GONE)
    more = fetch_state.next_reads(MEMBER, 1 << 40)
    assert places(more) == [(SLIDING, 384, 512)]
    deliver(fetch_state, tasks[1], tasks[2], *more)
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 512
    assert fetch_state.wait_layer(5)


def test_a_reader_leaves_when_nothing_can_be_lost_any_more() -> None:
    fetch_state, tasks = fetch_of(2)
    more: list[list[ReadTask]] = []
    reader = threading.Thread(target=lambda: more.append(fetch_state.next_reads(MEMBER, 1 << 40)))
    reader.start()
    reader.join(0.05)
    assert not more
    deliver(fetch_state, *tasks)
    reader.join(30)
    assert more == [[]]


def test_what_lacks_its_window_when_nothing_more_comes_is_computed() -> None:
    fetch_state, tasks = fetch_of(3, stall_s=0.05)
    deliver(fetch_state, tasks[1], tasks[2])
    assert not fetch_state.wait_layer(5)
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 0
    report = fetch_state.report()
    assert report.missing == {2: "stalled"}
    assert (report.delivered, report.fetched, report.computed) == (0, 0, 2)


# ---- whatever happens


def chunks_in_two_encodings(count: int) -> list[StoredChunk]:
    found = []
    for index, chunk_id in enumerate(ids(count)):
        keys, values = random_kv(index)
        coded = [
            encode_chunk(keys, values, spec=SPEC, chunk_id=chunk_id, encoding=Encoding.parse(name))
            for name in ("exact-raw", "exact-raw@32", "medium-raw@128")
        ]
        variants = tuple(Variant(one.header, one.parts[0]) for one in coded)
        found.append(StoredChunk(chunk_id, variants, MEMBER, 256 * index))
    return found


CHUNKS = chunks_in_two_encodings(5)
windows_of_layers = st.lists(
    st.sampled_from((None, 1, 63, 64, 65, 100, 300, 600)), min_size=SPEC.layers, max_size=SPEC.layers
)


class Simulation:
    """A ledger, what has arrived, and an engine that checks what it finds."""

    def __init__(self, windows: list[int | None], chunks: int) -> None:
        self.windows, self.chunks = windows, CHUNKS[:chunks]
        self.ledger = FetchLedger(self.chunks, SPEC.layers, None, (), windows)
        self.filled = torch.zeros(SPEC.layers, 256 * chunks, dtype=torch.bool)
        self.requested: list[ReadTask] = []
        self.is_closed = False

    def read(self) -> None:
        if not self.is_closed:
            self.requested += self.ledger.next_reads(MEMBER, 40_000)

    def deliver(self, number: int) -> None:
        task = self.requested.pop(number % len(self.requested))
        state = self.ledger.states[task.chunk_index]
        if not state.to_compute:
            state.decoding += 1
            assert not self.filled[task.layers, task.tokens].any(), "a range was read twice"
            self.filled[task.layers, task.tokens] = True
            self.ledger.deliver(task)

    def lose(self, number: int) -> None:
        task = self.requested.pop(number % len(self.requested))
        self.ledger.lose([task.chunk_index], MissReason.CHECKSUM)

    def requeue(self, number: int) -> None:
        index = number % len(self.requested)
        self.requested, late = self.requested[:index], self.requested[index:]
        self.ledger.requeue(late)

    def switch(self, number: int) -> None:
        state = self.ledger.states[number % len(self.chunks)]
        choice = number // len(self.chunks) % 4
        if state.is_lost or state.is_taken or not (state.unread or state.to_compute):
            return
        if choice == 3:
            state.choose(COMPUTE)
        elif (left := state.left(choice)) is not None:
            state.choose(choice)
            assert state.left(choice) == pytest.approx(left), "planned with another size"
        self.ledger.recount()

    def close(self) -> None:
        self.is_closed = True
        self.ledger.close(MEMBER)
        self.ledger.lose({task.chunk_index for task in self.requested}, MissReason.GONE)
        self.ledger.lose([state.index for state in self.ledger.states if state.unread], MissReason.GONE)
        self.requested = []

    def compute(self) -> bool:
        """Compute the next run that can be computed."""
        first = self.ledger.first_to_compute()
        if first is None or not self.ledger.is_settled_before(first):
            return False
        end = self.ledger.take_run(first)
        assert end is not None
        self.check(256 * first)
        self.filled[:, 256 * first : 256 * end] = True
        self.ledger.computed(first, end)
        return True

    def check(self, first: int) -> None:
        """All that an engine looks at from position `first` on is there."""
        for layer, window in enumerate(self.windows):
            begin = 0 if window is None else max(0, first - window + 1)
            assert self.filled[layer, begin:first].all(), f"layer {layer} before {first}"

    def finish(self) -> None:
        while self.ledger.open_chunks:
            self.read()
            assert self.requested, "nothing comes that is waited for"
            self.deliver(0)
        while self.compute():
            pass
        assert self.ledger.take_last_pass()
        assert not any(self.ledger.open_by_layer)
        first = self.ledger.reusable_tokens
        self.check(first)
        if first == 256 * len(self.chunks):
            self.check(first - 1)  # the prompt may end here


@settings(deadline=None, max_examples=300)
@given(windows_of_layers, st.integers(1, 5), st.data())
def test_the_engine_always_finds_what_it_looks_at(
    windows: list[int | None], chunks: int, data: st.DataObject
) -> None:
    run = Simulation(windows, chunks)
    for _ in range(data.draw(st.integers(0, 25))):
        actions = [
            "read",
            "switch",
            "compute",
            *["deliver", "deliver", "lose", "requeue"] * bool(run.requested),
        ]
        action, number = data.draw(st.sampled_from([*actions, "close"])), data.draw(st.integers(0, 99))
        if action in ("read", "compute", "close"):
            getattr(run, action)()
        else:
            getattr(run, action)(number)
    run.finish()


@given(windows_of_layers, st.integers(0, 2), st.integers(0, 2000))
def test_a_frame_is_wanted_if_some_window_of_its_period_reaches_it(
    windows: list[int | None], variant: int, computed_from: int
) -> None:
    chunk = CHUNKS[1]
    geometry = chunk.variants[variant].header.geometry
    for period in range(geometry.periods):
        layers = geometry.layers_of(period)
        slots = WantedFrames(chunk, windows=windows, computed_from=computed_from).slots(
            chunk.variants[variant], layers
        )
        assert list(slots) == [
            slot
            for slot in range(geometry.frames_per_period)
            if any(
                window is None or 256 + geometry.tokens_of(slot).stop > computed_from - window
                for window in windows[layers.start : layers.stop]
            )
        ]


def test_without_windows_every_frame_is_read() -> None:
    chunk = CHUNKS[0]
    geometry = chunk.header.geometry
    for windows in ((), (None,) * SPEC.layers):
        wanted = WantedFrames(chunk, windows=windows, computed_from=10_000)
        assert list(wanted.slots(chunk.variants[0], geometry.layers_of(0))) == [0, 1, 2, 3]
