"""Fetches to plan, shaped like those of a small model: SmolLM2's bytes and speeds on a CPU."""

from kvstore_client.planning import ChunkWork, Option, PrefillCost, Work

CHUNK_TOKENS = 256
RAW_BYTES_PER_TOKEN = 23_040
# Bits a value of 16, and MB/s of raw KV that one thread decodes and restores.
SHAPES = {
    "exact-raw": (16.0, 2000.0),
    "exact-zstd": (10.9, 400.0),
    "high-klt-pco": (0.85, 150.0),
    "medium-klt-pco": (0.41, 220.0),
    "medium-klt-hevc-cpu": (0.37, 70.0),
    "low-klt-pco": (0.19, 300.0),
    "low-klt-hevc-cpu": (0.16, 120.0),
}
RESTORE_SHARE = 0.1
PREFILL = PrefillCost(fixed_s=0.01, per_token_s=0.4e-3, per_pair_s=3e-8)


def options(*encodings: str, tokens: int = CHUNK_TOKENS) -> tuple[Option, ...]:
    raw = RAW_BYTES_PER_TOKEN * tokens
    made = []
    for name in encodings:
        bits, speed = SHAPES[name]
        seconds = raw / (speed * 1e6)
        made.append(
            Option(name, int(raw * bits / 16), seconds * (1 - RESTORE_SHARE), seconds * RESTORE_SHARE)
        )
    return tuple(made)


def chunk(index: int, *encodings: str, endpoint: str = "a", **more: object) -> ChunkWork:
    return ChunkWork(index, index * CHUNK_TOKENS, CHUNK_TOKENS, endpoint, options(*encodings), **more)  # type: ignore[arg-type]


def work(
    chunks: list[ChunkWork],
    bandwidth_Bps: float | dict[str, float] = 12.5e6,  # noqa: N803
    *,
    prefill: PrefillCost = PREFILL,
    interference: float = 1.0,
    decode_threads: int = 1,
    latency_s: float = 0.001,
    suffix_tokens: int = 100,
    engine_busy_s: float = 0.0,
    fixed_end: bool = False,
) -> Work:
    endpoints = {chunk.endpoint for chunk in chunks}
    bandwidths = bandwidth_Bps if isinstance(bandwidth_Bps, dict) else dict.fromkeys(endpoints, bandwidth_Bps)
    return Work(
        tuple(chunks),
        chunks[-1].first_token + chunks[-1].tokens if chunks else 0,
        suffix_tokens,
        bandwidths,
        dict.fromkeys(endpoints, latency_s),
        prefill,
        interference,
        decode_threads,
        engine_busy_s,
        fixed_end=fixed_end,
    )
