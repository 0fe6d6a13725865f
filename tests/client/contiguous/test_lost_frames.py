"""What becomes of frames that are damaged, evicted, unreadable or late: from a real node with a disk."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameRead
from kvstore_cluster.slow_disk import SlowNode
from kvstore_codec.identity import ChunkId
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.contiguous.test_generate import (
    DOCUMENT,
    GREEDY,
    PATIENT,
    PROMPT,
    partial_reference,
    prepared,
)
from tests.client.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = 0.5
PATIENCE_S = 20.0
FASTEST_BPS = 1e12


class Service:
    """Nodes that have the document on disk only, and a client of theirs that reads a period behind the one before."""

    def __init__(
        self, folder: Path, opened: ExitStack, *, nodes: int = 1, replicas: int = 1, **settings: Any
    ) -> None:
        self.folder = folder
        self.cluster: ServedCluster = opened.enter_context(
            served_cluster(
                folder, nodes=nodes, replicas=replicas, bulk=True, disk_bytes=64 << 20, experiments=True
            )
        )
        ports = [server.address for server in self.cluster.bulk]
        self.links = [opened.enter_context(ShapedLink(port, bandwidth_bps=10e9)) for port in ports]
        routes = {port: link.address for port, link in zip(ports, self.links, strict=True)}
        self.client: KVStoreClient = opened.enter_context(
            connect(self.cluster.address, routes=routes, budget_read_ahead=False, **(PATIENT | settings))
        )
        self.model = tiny_model()
        self.cached = prepared(self.client, self.model)
        opened.callback(self.cached.close)
        for node in self.cluster.nodes:
            assert isinstance(node, SlowNode)
            while node.maintain():
                pass
            node.limit_disk(FASTEST_BPS)
        self.ids = self.client.chunk_ids(self.cached.spec, DOCUMENT[0].tolist())
        _, self.before = self.answer()
        self.client.frame_cache.clear()

    def answer(self) -> tuple[torch.Tensor, ReprefillReport | None]:
        output = self.cached.generate(PROMPT, budget=BUDGET, **GREEDY)
        return output, self.cached.last_report.reprefill

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)

    def before_read(self, number: int, happens: Callable[[], None]) -> None:
        """Let something happen before this read of frames, counted from 0."""
        read_frames, reads = self.client.read_frames, iter(range(1000))

        def read(tasks: Sequence[ReadTask], **options: Any) -> FrameRead:
            if next(reads) == number:
                happens()
            return read_frames(tasks, **options)

        self.client.read_frames = read  # type: ignore[method-assign]

    def stored_frame(self, period: int, index: int) -> bytes:
        """The stored bytes of a frame."""
        chunk, slot = divmod(index, 4)
        node = self.cluster.nodes[0]
        with node.open(self.ids[chunk], "exact-zstd") as reader:
            return b"".join(bytes(v) for piece in reader.pieces(period * 4 + slot, 1, 1 << 20) for v in piece)

    def position(self, data: bytes) -> tuple[Path, int]:
        """Where these bytes are on the disk."""
        for path in self.folder.rglob("*"):
            if path.is_file() and (place := path.read_bytes().find(data)) >= 0:
                return path, place
        raise AssertionError("the bytes are on no disk")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def service(tmp_path: Path, opened: ExitStack) -> Service:
    return Service(tmp_path, opened)


def middle(report: ReprefillReport | None) -> int:
    """A frame that both periods have chosen, of a chunk behind the first one. Not a chunk's first one: in the second
    period that one shares a sector of the disk with a frame of the first period."""
    assert report is not None
    return next(
        index for index in report.sets[0] if 4 <= index < 20 and index % 4 and index in report.sets[1]
    )


def require_sets_without(service: Service, lost: set[int], reason: str) -> ReprefillReport:
    """The answer is that over the sets that are left, and these lack the lost frames."""
    output, report = service.answer()
    assert report is not None
    assert report.frames_missing == service.counted("frames_missing") > 0
    assert service.counted(f"miss_{reason}") == report.frames_missing
    assert lost.isdisjoint(report.sets[1])
    assert all(set(frames) <= set(had) for frames, had in zip(report.sets, service.before.sets, strict=True))
    assert len({len(frames) for frames in report.sets}) == 1
    assert torch.equal(output, partial_reference(service.model, report.sets))
    return report


def test_a_flipped_bit_on_the_disk_costs_its_frame(service: Service) -> None:
    victim = middle(service.before)
    data = service.stored_frame(1, victim)
    path, place = service.position(data)
    with path.open("r+b") as file:
        file.seek(place + len(data) // 2)
        file.write(bytes([data[len(data) // 2] ^ 0x10]))
    report = require_sets_without(service, {victim}, "gone")
    left = set(service.before.sets[1]) - set(report.sets[1])
    assert {index // 4 for index in left} == {victim // 4}
    assert service.cluster.nodes[0].stats().counters["damaged"] == 1
    again, _ = service.answer()  # the node has dropped the chunk: what is stored of the prefix ends before it
    assert torch.equal(again, service.model.generate(PROMPT, **GREEDY))


def test_a_disk_error_costs_the_frames_that_it_hits(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = middle(service.before)
    data = service.stored_frame(1, victim)
    _, place = service.position(data)
    preadv = os.preadv

    def fail_there(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset < place + len(data) and place < offset + sum(len(view) for view in views):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", fail_there)
    require_sets_without(service, {victim}, "gone")
    monkeypatch.undo()
    service.client.frame_cache.clear()
    _, report = service.answer()
    assert report is not None
    assert report.sets == service.before.sets


def test_an_eviction_in_the_middle_costs_the_rest_of_the_chunk(service: Service) -> None:
    victim = middle(service.before)
    chunk = victim // 4
    service.before_read(1, lambda: service.cluster.nodes[0].delete([service.ids[chunk]]))
    lost = {index for index in service.before.sets[1] if index // 4 == chunk}
    report = require_sets_without(service, lost, "gone")
    assert report.frames_missing == len(lost)


def test_without_the_first_frame_the_prefix_is_reused_as_without_a_budget(service: Service) -> None:
    service.before_read(1, lambda: service.cluster.nodes[0].delete([service.ids[0]]))
    output, report = service.answer()
    assert report is None
    assert torch.equal(output, service.model.generate(PROMPT, **GREEDY))
    assert service.counted("miss_reprefill_incomplete") == 1
    assert service.counted("frames_missing") > 0


def test_with_replicas_nothing_is_lost(tmp_path: Path, opened: ExitStack) -> None:
    service = Service(tmp_path, opened, nodes=2, replicas=2)
    service.before_read(1, lambda: service.cluster.stop_node(0))
    output, report = service.answer()
    assert report is not None
    assert report.frames_missing == 0
    assert report.sets == service.before.sets
    assert torch.equal(output, partial_reference(service.model, report.sets))


def test_a_damaged_copy_is_replaced_by_another(tmp_path: Path, opened: ExitStack) -> None:
    service = Service(tmp_path, opened, nodes=2, replicas=2)
    lost = service.ids[middle(service.before) // 4]
    service.before_read(1, lambda: delete_at_reader(service, lost))
    output, report = service.answer()
    assert report is not None
    assert report.sets == service.before.sets
    assert torch.equal(output, partial_reference(service.model, report.sets))
    assert service.counted("failover_gone") > 0


def delete_at_reader(service: Service, chunk_id: ChunkId) -> None:
    """Delete a chunk on the node that is asked for it."""
    match = service.client.match(service.cached.spec, service.ids, peek=True)
    holder = next(chunk.member for chunk in match.chunks if chunk.chunk_id == chunk_id)
    next(node for node in service.cluster.nodes if node.node_id == holder.node_id).delete([chunk_id])


def test_a_dead_node_ends_in_a_plain_answer(service: Service) -> None:
    service.before_read(1, service.cluster.stop_storage)
    output, report = service.answer()
    assert report is None
    assert torch.equal(output, service.model.generate(PROMPT, **GREEDY))
    assert service.counted("miss_reprefill_incomplete") == 1


def test_a_silent_node_is_given_up_at_the_stall_timeout(tmp_path: Path, opened: ExitStack) -> None:
    service = Service(tmp_path, opened, stall_timeout_s=0.5, fetch_timeout_s=3 * PATIENCE_S)
    service.before_read(1, service.links[0].cut)
    began_s = time.monotonic()
    output, report = service.answer()
    assert time.monotonic() - began_s < PATIENCE_S
    assert report is None
    assert torch.equal(output, service.model.generate(PROMPT, **GREEDY))
    assert service.counted("miss_stalled") > 0
