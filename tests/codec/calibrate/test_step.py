import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_codec.calibrate import find_step
from kvstore_codec.errors import CalibrationError


@given(
    scale=st.floats(1e-3, 1e3),
    power=st.floats(1.2, 3.5),
    start=st.floats(1e-2, 1e2),
    target=st.sampled_from([0.005, 0.02, 0.06]),
)
def test_the_step_of_a_power_law_is_found_in_few_measurements(
    scale: float, power: float, start: float, target: float
) -> None:
    tried: list[float] = []

    def measure(step: float) -> float:
        tried.append(step)
        return 0.01 * (step / scale) ** power

    solution = scale * (target / 0.01) ** (1 / power)
    distance = abs(math.log(start / solution))
    evaluations = 8 + int(distance / math.log(4))
    step = find_step(measure, target, start=start, largest=1e6, evaluations=evaluations)
    assert abs(math.log(measure(step) / target)) <= math.log(1.03) + 1e-9
    assert len(tried) <= evaluations + 1


def test_a_curve_that_saturates_is_bracketed() -> None:
    def measure(step: float) -> float:
        return 0.08 * (1 - math.exp(-(step**2)))

    step = find_step(measure, 0.06, start=0.01, largest=100.0, evaluations=12)
    assert measure(step) == pytest.approx(0.06, rel=0.03)


def test_a_model_that_never_notices_gets_the_largest_step() -> None:
    assert find_step(lambda _: 0.0, 0.005, start=1.0, largest=10.0) == 10.0


def test_measurements_are_limited_and_the_closest_is_taken() -> None:
    tried: list[float] = []

    def jump(step: float) -> float:
        tried.append(step)
        return 1e-3 if step < 1 else 1.0

    step = find_step(jump, 0.06, start=0.5, largest=10.0, evaluations=5)
    assert len(tried) == 5
    assert step in tried


def test_nonsense_is_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        find_step(lambda _: math.nan, 0.02, start=1.0, largest=10.0)
    with pytest.raises(CalibrationError, match="cannot search for a step"):
        find_step(lambda _: 1.0, 0.02, start=0.0, largest=0.0)
