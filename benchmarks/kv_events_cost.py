"""Measure what KV events cost: puts on a node with and without them in turns, and the hub of a large cluster.

    python benchmarks/kv_events_cost.py [--puts 1000] [--rounds 15] [--blocks 1000000] [--json F]

Puts: two nodes in this process, one that remembers changed chunks and reports them to a hub with a publisher, and a
subscriber that follows; one without. In each round every node stores and deletes the same chunks of about 80 KiB.
Processor time, publisher and subscriber included, and time of the putting thread. Hub: one node reports `--blocks`
blocks; time and memory of the index, and the time of a snapshot. Rows: {what, ...}, units in the names.
"""

import resource
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_api.placement import Member
from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.events.base import IN_MEMORY, NodeReport
from kvstore_cluster.events.changes import TierChanges
from kvstore_cluster.events.feed import ReportFeed
from kvstore_cluster.events.hub import EventHub
from kvstore_cluster.node import StorageNode
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

_FRAME_BYTES = 10_000
_REPORTED = 2048


def main(
    puts: Annotated[int, typer.Option(min=1, help="Chunks that are stored in each round.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, with and without events in turns.")] = 15,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the large cluster.")] = 1_000_000,
    json_file: JsonFile = None,
) -> None:
    """Measure what KV events cost."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = [_puts(Path(folder), puts, rounds), _hub(blocks)]
    for row in rows:
        print(row)
    write_results(rows, json_file)


def _puts(folder: Path, puts: int, rounds: int) -> dict[str, Any]:
    from kvstore_client.kv_events import EventSubscriber
    from kvstore_service.grpc_coordinator import serve_coordinator
    from kvstore_service.grpc_storage import serve_storage
    from kvstore_service.listen import Address, two_free_ports

    chunks = [_chunk(number) for number in range(puts)]
    memory_bytes = 2 * sum(len(data) for _, data in chunks)
    nodes = {events: StorageNode("node-0", Arena(memory_bytes), events=events) for events in (False, True)}
    for node in nodes.values():  # touches the memory
        _store(node, chunks)
    catalogue = FileCatalogue(folder)
    coordinator = Coordinator(catalogue)
    server = serve_storage(nodes[True], host="127.0.0.1")
    coordinator.join(Member("node-0", server.address), 1)
    hub = EventHub(lambda *node: node in coordinator.live())
    front = serve_coordinator(
        coordinator,
        CalibrationRegistry(folder / "calibrations"),
        CanaryRegistry(folder / "canaries"),
        hub,
        address=Address("127.0.0.1", 0),
        events=two_free_ports(Address("127.0.0.1", 0)),
    )
    feed = ReportFeed("node-0", 1, _changes(nodes[True]), hub.report)
    feed.start()
    wall: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    with EventSubscriber(front.address) as router:
        for number in range(2 * rounds):
            events = number % 2 == 1
            _follow(router, nodes[True])
            began_s, used_s = time.perf_counter(), time.process_time()
            _store(nodes[events], chunks)
            wall[events].append(time.perf_counter() - began_s)
            _follow(router, nodes[True])
            processor[events].append(time.process_time() - used_s)
    feed.stop()
    front.stop(0)
    server.stop(0)
    coordinator.close()
    catalogue.close()
    return {
        "what": "puts",
        "chunks": puts,
        "chunk_bytes": len(chunks[0][1]),
        "rounds": rounds,
        "put_us": _per_put(wall[False], puts),
        "put_with_events_us": _per_put(wall[True], puts),
        "added_percent": 100 * (statistics.median(wall[True]) / statistics.median(wall[False]) - 1),
        "processor_us": _per_put(processor[False], puts),
        "processor_with_events_us": _per_put(processor[True], puts),
        "batches": hub.stats()["batches"],
        "dropped": hub.stats()["dropped"],
    }


def _hub(blocks: int) -> dict[str, Any]:
    hub = EventHub(lambda *_: True)
    before_bytes = _resident_bytes()
    began_s = time.perf_counter()
    for number, begin in enumerate(range(0, blocks, _REPORTED), start=1):
        names = [place.to_bytes(32, "big") for place in range(begin, min(begin + _REPORTED, blocks))]
        states = {"": dict.fromkeys(names, IN_MEMORY)}
        hub.report(NodeReport("node-0", 1, number, states, from_scratch=number == 1))
    took_s, after_bytes = time.perf_counter() - began_s, _resident_bytes()
    began_s = time.perf_counter()
    batches = hub.since("", 0)
    locked_s = time.perf_counter() - began_s
    sizes = [len(payload) for _, payload in batches]
    return {
        "what": "hub",
        "blocks": blocks,
        "report_us_per_block": 1e6 * took_s / blocks,
        "index_and_log_bytes_per_block": (after_bytes - before_bytes) / blocks,
        "snapshot_locked_ms": 1e3 * locked_s,
        "snapshot_ms": 1e3 * (time.perf_counter() - began_s),
        "snapshot_bytes": sum(sizes),
    }


def _changes(node: StorageNode) -> TierChanges:
    if node.changes is None:
        raise ValueError("the node has no events")
    return node.changes


def _follow(router: Any, node: StorageNode) -> None:
    """Until the subscriber knows that the node is empty, or full."""
    while len(router.blocks.tiers) != node.stats().chunks or not router.is_current:
        router.poll(0.01)


def _store(node: StorageNode, chunks: list[tuple[ChunkId, bytes]]) -> None:
    for chunk_id, data in chunks:
        put = node.begin_put(chunk_id, "exact-zstd", len(data))
        if put is not None:
            put.write(data)
            put.commit()
    node.delete([chunk_id for chunk_id, _ in chunks])


def _chunk(number: int) -> tuple[ChunkId, bytes]:
    name = number.to_bytes(32, "big")
    chunk_id = ChunkId(ContentId(name), PrefixId(name))
    geometry = Geometry(layers=8, kv_heads=2, head_dim=16, dtype=KVDtype.BFLOAT16)
    frames = [bytes(_FRAME_BYTES)] * geometry.frame_count
    _, header = write_header(bytes(32), chunk_id, Encoding.parse("exact-zstd"), geometry, frames, None)
    return chunk_id, b"".join([header, *frames])


def _per_put(seconds: list[float], puts: int) -> float:
    return 1e6 * statistics.median(seconds) / puts


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    typer.run(main)
