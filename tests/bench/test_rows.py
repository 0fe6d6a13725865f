"""From what was measured to rows and a picture."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.codec import QUICK_ROWS, ROWS, plot_rate_distortion
from kvstore_bench.codec.fidelity import Fidelity, Passage
from kvstore_bench.codec.method import Coded, Speed
from kvstore_bench.codec.methods import needs_calibration, require_rows
from kvstore_bench.codec.minmax import MinMax
from kvstore_bench.codec.plot import curves
from kvstore_bench.codec.rows import frame_overheads, out_of_domain_row, row_of
from kvstore_bench.codec.texts import Excerpt
from kvstore_codec.errors import ConfigurationError, UnknownEncodingError
from kvstore_codec.identity import CHUNK_TOKENS
from tests.codec.chunks import make_kv, make_spec


def _passage() -> Passage:
    spec = make_spec(layers=1, kv_heads=1, head_dim=32)
    keys, values = make_kv(spec, 250)
    ids, nothing = torch.arange(250), torch.empty(0)
    return Passage(spec, Excerpt("noise", ids, ids), keys, values, nothing, nothing)


def _coded(stored_bytes: int, payload_bytes: int | None = None, **guarded: int) -> Coded:
    nothing = torch.empty(0)
    return Coded(
        nothing,
        nothing,
        stored_bytes,
        [2_000_000, 2_000_000],
        [1.0, 2.0],
        [0.5, 0.5],
        payload_bytes=payload_bytes,
        guarded=guarded,
    )


def test_a_row_counts_all_bytes_and_averages_the_passages() -> None:
    passages = [_passage(), _passage()]  # of 16,000 values
    coded = [_coded(3_000, 2_000, finer=2), _coded(5_000, 4_000, finer=1, exact=4)]
    judged = [Fidelity(0.01, 0.9, 2.0), Fidelity(0.03, 1.0, 2.0)]
    row = row_of(MinMax(8, "zstd"), passages, coded, judged)
    assert row["bits_per_value"] == 8 * 8_000 / 32_000
    assert row["payload_bits_per_value"] == 8 * 6_000 / 32_000
    assert row["kl"] == pytest.approx(0.02)
    assert row["kl_max"] == 0.03
    assert row["top1"] == pytest.approx(0.95)
    assert row["ppl"] == pytest.approx(torch.tensor(2.0).exp().item())
    assert (row["encode_MBps"], row["encode_MBps_iqr"]) == (1.5, 1.0)
    assert (row["decode_MBps"], row["decode_MBps_iqr"]) == (4.0, 0.0)
    assert row["restore_MBps"] is None
    assert (row["guarded_finer"], row["guarded_exact"]) == (3, 4)


def test_a_row_of_another_kind_of_text_says_what_the_guard_did() -> None:
    row = out_of_domain_row(MinMax(8, "zstd"), _passage(), _coded(4_000, finer=7), Fidelity(0.02, 0.9, 1.0))
    assert (row["text"], row["bits_per_value"], row["kl"]) == ("noise", 2.0, 0.02)
    assert (row["guarded_finer"], row["guarded_exact"]) == (7, 0)


def test_speed_is_a_median_with_its_spread() -> None:
    assert Speed.of([1_000_000] * 4, [1.0, 0.5, 0.25, 0.2]) == Speed(3.0, pytest.approx(2.5))
    assert Speed.of([], []) is None


def test_small_frames_are_compared_with_whole_chunks_of_the_same_encoding() -> None:
    bits = {"medium-klt-pco": 0.41, "medium-klt-pco@256": 0.40, "medium-zstd": 4.0, "low-klt-pco@128": 0.2}
    rows = [
        {"name": name, "method": "kvstore", "frame_tokens": 64, "bits_per_value": b}
        for name, b in bits.items()
    ]
    found = {row["name"]: row["frame_overhead_percent"] for row in frame_overheads(rows)}
    assert found == {"medium-klt-pco": pytest.approx(2.5), "medium-klt-pco@256": 0.0}


def test_every_row_that_is_measured_by_default_exists() -> None:
    require_rows(ROWS)
    require_rows(QUICK_ROWS)
    assert len(set(ROWS)) == len(ROWS)
    assert needs_calibration("low-klt-zstd")
    assert not any(map(needs_calibration, ("exact-zstd", "minmax8-zstd", "cachegen-32@1024")))


@pytest.mark.parametrize("name", ["medium-klt-gzip", "minmax8", "cachegen-", "cachegen-32@", ""])
def test_a_row_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(UnknownEncodingError):
        require_rows([name])


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no rows are given to measure"):
        require_rows([])


def _row(
    method: str, name: str, layout: str, coder: str, bits: float, kl: float, **more: Any
) -> dict[str, Any]:
    defaults = {"rate": name, "frame_tokens": CHUNK_TOKENS, "payload_bits_per_value": None}
    return defaults | {
        "method": method,
        "name": name,
        "layout": layout,
        "coder": coder,
        "bits_per_value": bits,
        "kl": kl,
        **more,
    }


_ROWS = [
    _row("kvstore", "exact-zstd", "planes", "zstd", 10.8, 0.0),
    _row("kvstore", "low-klt-pco", "klt_frames", "pco", 0.22, 0.06),
    _row("kvstore", "medium-klt-pco", "klt_frames", "pco", 0.45, 0.018),
    _row("kvstore", "medium-klt-pco@256", "klt_frames", "pco", 0.44, 0.018),
    _row("kvstore", "medium-zstd", "token_frames", "zstd", 3.6, 0.02),
    _row("min/max", "minmax6-zstd", "planes", "zstd", 5.8, 0.002),
    _row("CacheGen", "cachegen-32", "cachegen", "cachegen", 5.0, 0.02, payload_bits_per_value=2.9),
    _row("CacheGen", "cachegen-16", "cachegen", "cachegen", 4.2, 0.09, payload_bits_per_value=2.1),
    _row(
        "CacheGen",
        "cachegen-32@1024",
        "cachegen",
        "cachegen",
        3.4,
        0.02,
        payload_bits_per_value=2.9,
        frame_tokens=1024,
    ),
]


def test_every_family_has_a_curve_by_falling_bits() -> None:
    drawn = {curve.label: curve for curve in curves(_ROWS)}
    assert [rate for *_, rate in drawn["klt_frames, pco"].points] == ["medium-klt-pco", "low-klt-pco"]
    assert len(drawn["CacheGen, 256-token chunks"].points) == 2
    assert drawn["CacheGen, 256-token chunks, payload only"].dashed
    assert len(drawn) == 6  # exact KV has no place on a logarithmic axis
    assert len({(curve.colour, curve.dashed) for curve in drawn.values()}) == len(drawn)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    for rows in (_ROWS, _ROWS[:1]):
        path = tmp_path / "new" / "curves.png"
        plot_rate_distortion(rows, "a title", path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        path.unlink()
