"""Measure reads of single frames from a storage node's disk: queue depth, merging, page cache, against whole chunks.

python benchmarks/frame_reads.py [--folder DIR] [--frame-kib 8,32,96] [--chunks 32] [--json FILE] [--plot FILE]

Each request reads, as a re-prefill does for one period, some frames of every chunk of a prefix: two neighbouring ones
and one apart. `sync` is the path that reads range after range (`StorageNode.open`), `whole` reads all chunks entirely.
The ways are measured in turns, each on a node and a store of its own. Each request reads another period than the one
before, so that no frame is read twice in a row.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from kvstore_bench.results import write_results
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.frame_reads import FrameReadOptions
from kvstore_cluster.node import StorageNode
from kvstore_cluster.residency import Residency
from kvstore_codec.chunk import write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype

ENCODING = "exact-raw"
GEOMETRY = Geometry(layers=32, kv_heads=2, head_dim=64, dtype=KVDtype.BFLOAT16)
SLOTS = (0, 1, 3)
_SPARE_BYTES = 256 << 20


class Wanted(NamedTuple):
    chunk: int
    first_frame: int
    frame_count: int


class OnlyOnDisk(Residency):
    """Keeps nothing in memory, so that every read comes from disk."""

    def promotes(self, length: int, size_bytes: int) -> bool:  # noqa: ARG002
        return False

    def watermarks(self) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class Way:
    """How frames are read. `depth` 0 is the synchronous path."""

    name: str
    depth: int
    merge: bool = True
    direct: bool = True


WAYS = (
    Way("sync", 0),
    *(Way("frames", depth) for depth in (1, 4, 16)),
    Way("frames", 16, merge=False),
    *(Way("frames", depth, direct=False) for depth in (1, 16)),
    Way("whole", 16),
)


class Prefix:
    """The chunks of a prefix, with frames of about `frame_bytes` random bytes."""

    def __init__(self, chunks: int, frame_bytes: int) -> None:
        generator = random.Random(frame_bytes)
        self.names = [
            ChunkId(ContentId(blake3(b"c%d" % n).digest()), PrefixId(blake3(b"p%d" % n).digest()))
            for n in range(chunks)
        ]
        frames = [generator.randbytes(frame_bytes - n % 97) for n in range(GEOMETRY.frame_count)]
        self.frames = frames
        self.encodings = [ENCODING] * chunks

    def put(self, node: StorageNode) -> None:
        for name in self.names:
            _, header = write_header(bytes(32), name, Encoding.parse(ENCODING), GEOMETRY, self.frames)
            data = b"".join([header, *self.frames])
            put = node.begin_put(name, ENCODING, len(data))
            if put is not None:
                put.write(memoryview(data))
                put.commit()

    def ranges(self, period: int) -> list[Wanted]:
        first = period * GEOMETRY.frames_per_period
        return [Wanted(chunk, first + slot, 1) for chunk in range(len(self.names)) for slot in SLOTS]


@contextmanager
def opened(folder: Path, way: Way, limit_bytes: int) -> Iterator[StorageNode]:
    store = SegmentStore(folder, limit_bytes, direct=way.direct)
    node = StorageNode(
        "node-0",
        Arena(64 << 20),
        store=store,
        residency=OnlyOnDisk(),
        frame_reads=FrameReadOptions(max(1, way.depth), way.merge),
    )
    try:
        yield node
    finally:
        node.close()


def read(node: StorageNode, way: Way, prefix: Prefix, period: int) -> int:
    """Reads the frames of one period. Returns their bytes."""
    ranges = prefix.ranges(period)
    if way.name == "sync":
        return sum(_read_one(node, prefix, wanted) for wanted in ranges)
    if way.name == "whole":
        ranges = [Wanted(chunk, 0, GEOMETRY.frame_count) for chunk in range(len(prefix.names))]
    with node.read_frames(prefix.names, prefix.encodings, ranges) as found:
        return sum(data.size_bytes for data in found)


def _read_one(node: StorageNode, prefix: Prefix, wanted: Wanted) -> int:
    with node.open(prefix.names[wanted.chunk], ENCODING) as reader:
        pieces = reader.pieces(wanted.first_frame, wanted.frame_count, 1 << 20)
        return sum(view.nbytes for piece in pieces for view in piece)


def measure(folder: Path, frame_bytes: int, chunks: int, rounds: int) -> list[dict[str, object]]:
    """Rows of all ways for one frame size. Each way has a node of its own with the same chunks."""
    prefix = Prefix(chunks, frame_bytes)
    limit_bytes = 2 * chunks * frame_bytes * GEOMETRY.frame_count + _SPARE_BYTES
    times_s: dict[Way, list[float]] = {way: [] for way in WAYS}
    sizes: dict[Way, int] = {}
    with ExitStack() as stack:
        nodes = {
            way: stack.enter_context(opened(folder / str(number), way, limit_bytes))
            for number, way in enumerate(WAYS)
        }
        for way, node in nodes.items():
            prefix.put(node)
            while node.maintain():
                pass
            sizes[way] = read(node, way, prefix, 0)  # reads the headers
        before = {way: node.stats().counters for way, node in nodes.items()}
        for number in range(rounds):
            for way, node in nodes.items():
                begin_s = time.perf_counter()
                read(node, way, prefix, number % GEOMETRY.periods)
                times_s[way].append(time.perf_counter() - begin_s)
        rows: list[dict[str, object]] = []
        for way, node in nodes.items():
            after, median_s = node.stats().counters, statistics.median(times_s[way])
            rows.append(
                {
                    "frame_bytes": frame_bytes,
                    "chunks": chunks,
                    "system": way.name,
                    "depth": way.depth,
                    "merge": way.merge,
                    "direct": bool(node.stats().gauges["disk_direct"]),
                    "median_s": round(median_s, 6),
                    "fastest_s": round(min(times_s[way]), 6),
                    "frames_bytes": sizes[way],
                    "disk_reads": (after["frame_disk_reads"] - before[way]["frame_disk_reads"]) // rounds,
                    "disk_bytes": (after["frame_disk_bytes"] - before[way]["frame_disk_bytes"]) // rounds,
                    "bandwidth_Bps": round(sizes[way] / median_s),
                }
            )
            print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for way in WAYS:
        mine = [
            row
            for row in rows
            if (row["system"], row["depth"], row["merge"], row["direct"])
            == (way.name, way.depth, way.merge, way.direct)
        ]
        label = f"{way.name} {way.depth or ''}".strip()
        label += ("" if way.merge else ", not merged") + ("" if way.direct else ", page cache")
        sizes = [int(str(row["frame_bytes"])) / 1024 for row in mine]
        axes.plot(sizes, [1e3 * float(str(row["median_s"])) for row in mine], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="frame, KiB", ylabel="median of a request, ms")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--frame-kib", default="8,32,96", help="frame sizes, KiB")
    parser.add_argument("--chunks", type=int, default=32, help="chunks of the prefix")
    parser.add_argument("--rounds", type=int, default=24, help="requests per way")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="write a plot of the medians to this file")
    options = parser.parse_args()
    rows = []
    for size_kib in map(int, options.frame_kib.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(Path(folder), size_kib << 10, options.chunks, options.rounds)
    write_results(rows, options.json, {"rounds": options.rounds})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
