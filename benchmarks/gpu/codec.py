"""Measure KV decoding on an NVIDIA GPU: supported formats, decoding rates, and the effect on a model that runs
meanwhile.

    python benchmarks/gpu/codec.py --json benchmarks/results/gpu_codec.json

Tables:

capabilities   formats that NVDEC decodes
rows           {coder, width, height, streams, Msamples_per_s, MBps, identical}: NVDEC decoding HEVC streams that a CPU
               encoded, compared with zstd on the CPU and a copy to the GPU. MBps is of bf16 KV with 7 coded samples per
               24 values, as at `medium`
restore        {tokens, values, MBps}: converting integers to KV on the GPU
overlap        {decode_alone_s, product_alone_s, decode_beside_s, product_beside_s}: NVDEC during a matrix product

Needs PyNvVideoCodec and a GPU. Without them, it prints the reason and measures nothing.
"""

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile
from kvstore_codec.calibration import PeriodTransform
from kvstore_codec.coders import coder
from kvstore_codec.coders.hevc.cpu import HevcCpu420Coder
from kvstore_codec.coders.hevc.nvidia import NvdecCoder, capabilities
from kvstore_codec.errors import CoderUnavailableError
from kvstore_codec.klt import PeriodKLT, compute_dtype

SIZES = ((192, 160), (256, 256), (512, 256), (1024, 512), (1920, 1080))
STREAMS = (1, 2, 4, 8, 16)
PICTURES = 64
REPEATS = 5
# Coded samples per value of a frame, as `medium` has for SmolLM2.
CODED_SHARE = 7 / 24
VALUES, COLUMNS, RANK, FEATURES = 4096, 1024, 128, 2048
DEVICE = "cuda:0"


def main(json_file: JsonFile = None) -> None:
    """Measure KV decoding on this machine's GPU."""
    console = Console()
    try:
        found, nvdec = capabilities(), coder("hevc-nvdec")
    except CoderUnavailableError as error:
        console.print(f"nothing to measure: {error}", markup=False)
        return
    assert isinstance(nvdec, NvdecCoder)  # noqa: S101  # narrows the coder's type
    caps = [
        {"chroma": chroma.name, "max_width": size[0], "max_height": size[1], "engines": found.decode_engines}
        for chroma, size in found.decodes.items()
    ]
    rows = [row for size in SIZES for streams in STREAMS for row in decode_rows(nvdec, size, streams)]
    restore = [restore_row(tokens) for tokens in (64, 256, 1024, 4096)]
    overlap = [overlap_row(nvdec)]
    for title, table in (
        ("NVDEC", caps),
        ("decoding", rows),
        ("restoring", restore),
        ("decoding during a matrix product", overlap),
    ):
        console.print(_table(title, table))
    meta = {"gpu": torch.cuda.get_device_name(), "why_no_encoder": found.why_no_encoder}
    write_results(rows, json_file, meta, capabilities=caps, restore=restore, overlap=overlap)


def pictures_of(width: int, height: int) -> np.ndarray:
    """A picture u8 `[1, 1, height, width]` like a frame at `medium`: the standard deviation falls from row to row."""
    deviation = np.linspace(3, 0.1, height)[:, None]
    noise = np.random.default_rng(0).standard_normal((1, 1, height, width)) * deviation
    return (128 + noise.round()).clip(0, 255).astype(np.uint8)


def decode_rows(nvdec: NvdecCoder, size: tuple[int, int], streams: int) -> list[dict[str, Any]]:
    """Rows for HEVC and zstd with the same samples, measured alternately."""
    picture = pictures_of(*size)
    hevc, zstd = HevcCpu420Coder().encode_pictures(picture), coder("zstd").encode(picture[0, 0])

    def by_nvdec(_: int) -> torch.Tensor:
        return nvdec.decode_on_gpu(hevc, picture.shape)

    def by_zstd(_: int) -> torch.Tensor:
        plane = np.empty(picture.shape[2:], np.uint8)
        coder("zstd").decode(zstd, plane)
        on_gpu = torch.from_numpy(plane).to(DEVICE)
        torch.cuda.current_stream().synchronize()
        return on_gpu

    ways: dict[str, Callable[[int], torch.Tensor]] = {"hevc-nvdec": by_nvdec, "zstd": by_zstd}
    identical = {
        name: bool((way(0).cpu().reshape(picture.shape[2:]) == torch.from_numpy(picture[0, 0])).all())
        for name, way in ways.items()
    }
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(streams) as pool:
        for _ in range(REPEATS):
            for name, way in ways.items():
                begin = time.perf_counter()
                list(pool.map(way, range(PICTURES)))
                taken_s[name].append(time.perf_counter() - begin)  # each decoder waits for its own copies
    rows = []
    for name, times in taken_s.items():
        per_s = PICTURES * picture.size / statistics.median(times)
        rows.append(
            {
                "coder": name,
                "width": size[0],
                "height": size[1],
                "streams": streams,
                "Msamples_per_s": per_s / 1e6,
                "MBps": 2 * per_s / CODED_SHARE / 1e6,
                "spread": (max(times) - min(times)) / statistics.median(times),
                "identical": identical[name],
            }
        )
    return rows


def restore_row(tokens: int) -> dict[str, Any]:
    """Row for one period of a 7B-class model: K and V of 2 layers, 8 heads, 128 values each."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(VALUES, COLUMNS, generator=generator))[0]
    klt = PeriodKLT(
        PeriodTransform(
            mean=torch.randn(VALUES, generator=generator),
            predictor_in=torch.randn(FEATURES, RANK, generator=generator),
            predictor_out=torch.randn(RANK, VALUES, generator=generator),
            whitening=torch.eye(128).expand(2, 2, 8, 128, 128).contiguous(),
            basis=basis,
            variances=torch.linspace(2, 1, COLUMNS),
        )
    )
    inputs, room = klt.inputs(torch.zeros(tokens, RANK, dtype=compute_dtype()), COLUMNS)
    room.copy_(torch.randn(room.shape, generator=generator))
    inputs = inputs.to(DEVICE)
    keys, values = torch.empty(2, 2, 8, tokens, 128, dtype=torch.bfloat16, device=DEVICE)
    times = [_timed(lambda: klt.restore_(inputs, keys, values)) for _ in range(REPEATS + 1)][1:]
    size = keys.nbytes + values.nbytes
    return {"tokens": tokens, "values": VALUES, "MBps": size / statistics.median(times) / 1e6}


def overlap_row(nvdec: NvdecCoder) -> dict[str, Any]:
    """Median times of a fixed amount of decoding and of matrix products, each alone and while the other runs."""
    picture = pictures_of(1024, 512)
    hevc = HevcCpu420Coder().encode_pictures(picture)
    left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=DEVICE)

    def decode() -> None:
        for _ in range(2 * PICTURES):
            nvdec.decode_on_gpu(hevc, picture.shape)

    def product() -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for _ in range(200):
                torch.mm(left, right)
            torch.cuda.current_stream().synchronize()

    row = {}
    for name, one, other in (("decode", decode, product), ("product", product, decode)):
        row[f"{name}_alone_s"] = statistics.median(_timed(one) for _ in range(REPEATS))
        row[f"{name}_beside_s"] = statistics.median(_beside(one, other) for _ in range(REPEATS))
    return row


def _beside(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Seconds of `one` while another thread repeats `other`."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            other()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return _timed(one)
    finally:
        over.set()
        thread.join()


def _timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, including all work on the GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    typer.run(main)
