"""Measure what signing costs: bytes of a chunk, and time to store, to look up and to read it.

python benchmarks/signed_chunks.py [--seconds 0.5] [--json FILE]

The chunks have the shape of SmolLM2's (30 layers, periods of 4, 256 tokens: 32 frames) and random bytes of the size
that its KV has in each encoding (docs/benchmarks.md). All times are of one thread, medians, per chunk. They are in
addition to what an unsigned chunk costs, except `checksums_us`, the time to verify the checksums of all frames, which
every reader does.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from kvstore_bench import write_results
from kvstore_codec.chunk import read_header, write_header
from kvstore_codec.encoding import Encoding
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.signing import verified
from kvstore_codec.signing_keys import SigningKeys

GEOMETRY = Geometry(layers=30, kv_heads=3, head_dim=64, dtype=KVDtype.BFLOAT16)
BITS_PER_VALUE = {"exact-zstd": 10.9, "high-zstd": 4.7, "high-klt-pco": 0.85, "medium-klt-pco": 0.41}
VALUES = 2 * 30 * 3 * 64 * 256


def median_us(call: Callable[[], object], seconds: float) -> float:
    """Median time of a call, microseconds."""
    times_s: list[float] = []
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s or len(times_s) < 5:
        begin_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - begin_s)
    return 1e6 * statistics.median(times_s)


def measure(name: str, bits_per_value: float, seconds: float) -> dict[str, float | str]:
    encoding = Encoding.parse(name)
    frame_bytes = int(VALUES * bits_per_value / 8 / GEOMETRY.frame_count)
    frames = [os.urandom(frame_bytes) for _ in range(GEOMETRY.frame_count)]
    chunk_id = ChunkId(ContentId(os.urandom(32)), PrefixId(os.urandom(32)))
    calibration = bytes(32) if encoding.needs_calibration else None
    keys = SigningKeys([os.urandom(32)])

    def written(by: SigningKeys | None) -> bytes:
        return write_header(bytes(32), chunk_id, encoding, GEOMETRY, frames, calibration, keys=by)[1]

    plain, signed = written(None), written(keys)
    header, trusted = read_header(signed), verified(read_header(signed), signed, keys)
    body = b"".join(frames)
    checksums_us = median_us(lambda: header.verify_frames(0, GEOMETRY.frame_count, body), seconds)
    digests_us = median_us(lambda: trusted.verify_frames(0, GEOMETRY.frame_count, body), seconds)
    extra_bytes = len(signed) - len(plain)
    return {
        "encoding": name,
        "chunk_bytes": len(plain) + len(body),
        "extra_bytes": extra_bytes,
        "extra_percent": round(100 * extra_bytes / (len(plain) + len(body)), 3),
        "store_us": round(
            median_us(lambda: written(keys), seconds) - median_us(lambda: written(None), seconds), 1
        ),
        "lookup_us": round(
            median_us(lambda: verified(read_header(signed), signed, keys), seconds)
            - median_us(lambda: read_header(plain), seconds),
            1,
        ),
        "read_us": round(digests_us - checksums_us, 1),
        "checksums_us": round(checksums_us, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.5, help="time of each measurement")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    rows = [measure(name, bits, options.seconds) for name, bits in BITS_PER_VALUE.items()]
    print(" ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:>14}" for value in row.values()))
    write_results(rows, options.json, {"frames": GEOMETRY.frame_count})


if __name__ == "__main__":
    main()
