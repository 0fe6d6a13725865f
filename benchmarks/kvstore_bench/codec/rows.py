"""Makes the rows of the result from measured passages."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from kvstore_bench.codec.fidelity import Fidelity, Passage, perplexity
from kvstore_bench.codec.method import Coded, Method, Speed
from kvstore_codec.encoding import Encoding


def row_of(
    method: Method, passages: Sequence[Passage], coded: Sequence[Coded], judged: Sequence[Fidelity]
) -> dict[str, Any]:
    """The row of a method over all passages: bits from all stored bytes, mean fidelity, median speed."""
    values = sum(passage.kv_values for passage in passages)
    payloads = [part.payload_bytes for part in coded if part.payload_bytes is not None]
    divergences = [fidelity.kl for fidelity in judged]
    timed = list(chain(*(part.timed_bytes for part in coded)))
    restored = timed if any(part.restore_s for part in coded) else []
    speeds = {
        "encode": Speed.of(timed, chain(*(part.encode_s for part in coded))),
        "decode": Speed.of(timed, chain(*(part.decode_s for part in coded))),
        "restore": Speed.of(restored, chain(*(part.restore_s for part in coded))),
    }
    return {
        "name": method.name,
        **method.labels,
        "bits_per_value": 8 * sum(part.stored_bytes for part in coded) / values,
        "payload_bits_per_value": 8 * sum(payloads) / values if payloads else None,
        "kl": sum(divergences) / len(divergences),
        "kl_max": max(divergences),
        "top1": sum(fidelity.top1 for fidelity in judged) / len(judged),
        "ppl": perplexity(judged),
        **{f"{stage}_MBps": speed and round(speed.median, 2) for stage, speed in speeds.items()},
        **{f"{stage}_MBps_iqr": speed and round(speed.iqr, 2) for stage, speed in speeds.items()},
        **_guarded(coded),
    }


def out_of_domain_row(method: Method, passage: Passage, coded: Coded, judged: Fidelity) -> dict[str, Any]:
    return {
        "text": passage.excerpt.source,
        "name": method.name,
        "bits_per_value": 8 * coded.stored_bytes / passage.kv_values,
        "kl": judged.kl,
        "top1": judged.top1,
        **_guarded([coded]),
    }


def frame_overheads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Overhead of smaller frames, in percent of the bytes of the same encoding with one frame per chunk and period."""
    bits = {row["name"]: row["bits_per_value"] for row in rows}
    return [
        {
            "name": row["name"],
            "frame_tokens": row["frame_tokens"],
            "frame_overhead_percent": 100 * (row["bits_per_value"] / bits[whole] - 1),
        }
        for row in rows
        if row["method"] == "kvstore"
        and (whole := replace(Encoding.parse(row["name"]), frame_tokens=256).name) in bits
    ]


def _guarded(coded: Sequence[Coded]) -> dict[str, int]:
    return {
        f"guarded_{kind}": sum(part.guarded.get(kind, 0) for part in coded) for kind in ("finer", "exact")
    }
