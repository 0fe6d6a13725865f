"""A small model is calibrated whole, as `kvstore calibrate` does it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration
from kvstore_service.calibration import RATES, TARGET_SHARE, Options, Plan, calibrate, plan_passages
from tests.client.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Log:
    def __init__(self, stop_after: int | None = None) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.notes: list[str] = []
        self._stop_after = stop_after

    def advance(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("read", self._stop_after):
            raise KeyboardInterrupt
        self.stages.append((stage, done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def read(self) -> int:
        """Passages the model has read."""
        return sum(stage == "read" and done < total for stage, done, total in self.stages)


def sharp_model(family: str) -> ObservedModel:
    """Random weights, but large enough for the model to mind what its KV is."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return ObservedModel(model)


def plan(seed: int = 0) -> Plan:
    text = torch.randint(2, 512, (600,), generator=torch.Generator().manual_seed(seed))
    return plan_passages([text], 10**6, 8192)


OPTIONS = Options(period_layers=2, rank=8)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_rate_gets_the_step_of_its_fidelity(family: str) -> None:
    log = Log()
    observed = sharp_model(family)
    made = calibrate(observed, plan(), OPTIONS, log, provenance={"texts": ["random"]})
    made.require(observed.spec)
    assert [period.layers for period in made.periods] == [2, 2, 1]
    assert made.steps["high"] < made.steps["medium"] < made.steps["low"]
    for high, medium, low in zip(*made.errors.values(), strict=True):
        assert high < medium < low
    for rate, limit in RATES.items():
        assert made.provenance["kl"][rate] == pytest.approx(TARGET_SHARE * limit, rel=0.1)
    assert made.provenance["texts"] == ["random"]
    assert made.digest == Calibration.from_bytes(made.to_bytes()).digest
    assert log.stages[-1][1] == log.stages[-1][2]


def test_a_model_that_minds_nothing_is_calibrated_too() -> None:
    """A random model's logits hardly depend on its KV: every step will do, and the coarsest is finite."""
    made = calibrate(ObservedModel(tiny_model()), plan(), replace(OPTIONS, rank=0), Log())
    assert set(made.steps) == set(RATES)
    assert all(kl < 0.07 for kl in made.provenance["kl"].values())
    assert made.periods[0].predictor_in.shape == (128, 0)


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    observed, state = sharp_model("qwen3"), tmp_path / "state"
    whole = calibrate(observed, plan(), OPTIONS, Log())
    with pytest.raises(KeyboardInterrupt):
        calibrate(observed, plan(), OPTIONS, Log(stop_after=3), state=state)
    log = Log()
    resumed = calibrate(observed, plan(), OPTIONS, log, state=state)
    assert log.read == len(plan().fitted) - 3
    assert "3 passages are already read" in log.notes[0]
    assert resumed.digest == whole.digest


def test_another_rank_needs_no_reading_and_another_text_starts_over(tmp_path: Path) -> None:
    observed, state = sharp_model("llama"), tmp_path / "state"
    calibrate(observed, plan(), OPTIONS, Log(), state=state)
    log = Log()
    calibrate(observed, plan(), replace(OPTIONS, rank=0), log, state=state)
    assert log.read == 0
    log = Log()
    calibrate(observed, plan(seed=1), OPTIONS, log, state=state)
    assert log.read == len(plan().fitted)
    assert "starting over" in log.notes[0]
    state.write_bytes(state.read_bytes()[:-9])
    log = Log()
    calibrate(observed, plan(), OPTIONS, log, state=state)
    assert "starting over" in log.notes[0]
