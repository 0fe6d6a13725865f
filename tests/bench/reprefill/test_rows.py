"""From what was measured to rows and a picture."""

from pathlib import Path

import pytest
import torch

from kvstore_bench.reprefill.plot import plot_reprefill
from kvstore_bench.reprefill.prompts import Question
from kvstore_bench.reprefill.rows import fidelity_of, row_of
from kvstore_bench.reprefill.systems import Asked


def predictions(*tokens: int) -> torch.Tensor:
    """A model that is sure of these tokens."""
    logits = torch.zeros(len(tokens), 10)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 9
    return logits.log_softmax(-1)


def test_predictions_are_judged_one_token_ahead() -> None:
    question = Question("fact", torch.tensor([1, 2, 3, 4]), judged=2, answer="3")
    exact = predictions(0, 3, 4, 0)
    same = fidelity_of([question], [exact], [exact])
    assert (same.kl, same.top1, same.right) == (0, 1, 1)
    assert fidelity_of([question], [exact], [predictions(7, 3, 4, 7)]).kl == 0
    wrong = fidelity_of([question], [exact], [predictions(0, 7, 7, 0)])
    assert wrong.kl > 5
    assert (wrong.top1, wrong.right) == (0, 0)


def test_kl_is_told_by_kind() -> None:
    questions = [Question("text", torch.tensor([1, 2]), 1), Question("quote", torch.tensor([1, 2]), 1)]
    exact = [predictions(2, 0)] * 2
    found = fidelity_of(questions, exact, [exact[0], predictions(5, 0)])
    assert found.kl_by_kind["text"] == 0
    assert found.kl == pytest.approx(found.kl_by_kind["quote"] / 2)


def test_a_row_sums_up_the_questions(tmp_path: Path) -> None:
    asked = [
        Asked(1.0, 100, 80, 64, 0.5, 0.25, 0.5, summary_bytes=40),
        Asked(3.0, 300, 120, 128, 1.0, 0.75, 3.5),
    ]
    facts = {"system": "contiguous", "budget": 0.05, "disk": "ssd"}
    row = row_of(asked, None, disk_bandwidth_Bps=None, **facts)
    assert (row["ttft_s"], row["p95_s"]) == (2.0, 3.0)
    assert (row["bytes_read"], row["bytes_needed"], row["read_amplification"]) == (200, 100, 2.0)
    assert (row["summary_bytes"], row["frame_amplification"]) == (20, 1.8)
    assert row["idle_compute_fraction"] == pytest.approx(0.25)
    assert row["idle_io_fraction"] == pytest.approx(0.25)
    assert row["kl"] is None
    limited = row_of(asked, None, disk_bandwidth_Bps=400, **facts)
    assert limited["idle_io_fraction"] == pytest.approx(1 - (0.25 + 0.25) / 2)
    cold = row_of([Asked(4.0)], None, system="cold", budget=None, disk="ssd", disk_bandwidth_Bps=None)
    assert cold["read_amplification"] is None
    for name, rows in (("bars", []), ("lines", [row | {"kl": 0.05, "budget": 0.25}])):
        plot_reprefill([row | {"kl": 0.1}, *rows, cold], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
