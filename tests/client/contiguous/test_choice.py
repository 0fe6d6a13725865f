"""How many frames a budget reads, and which."""

import pytest
import torch

from kvstore_client.contiguous.choice import choose, frames_within


@pytest.mark.parametrize(
    ("budget", "frames", "count"),
    [
        (0.05, 64, 3),
        (0.1, 64, 6),
        (0.25, 64, 16),
        (0.5, 64, 32),
        (1.0, 64, 64),
        (0.05, 128, 6),
        (0.29, 100, 29),
    ],
)
def test_a_budget_is_a_share_of_the_frames(budget: float, frames: int, count: int) -> None:
    assert frames_within(budget, frames) == count


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (2, 2), (3, 3), (4, 3), (40, 3)])
def test_the_question_always_has_a_frame_to_choose(frames: int, count: int) -> None:
    assert frames_within(0.001, frames) == count


def test_sinks_and_recent_frames_are_always_chosen() -> None:
    scores = torch.tensor([0.0, 0.1, 0.5, 0.3, 0.0])
    assert choose(scores, 3) == [0, 2, 4]
    assert choose(scores, 4) == [0, 2, 3, 4]
    assert choose(scores, 5) == [0, 1, 2, 3, 4]


def test_a_score_that_is_no_number_displaces_nothing() -> None:
    scores = torch.tensor([0.1, float("nan"), 0.2, 0.3, 0.4])
    assert choose(scores, 4) == [0, 2, 3, 4]
