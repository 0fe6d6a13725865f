"""Which frames of a prefix a question reads: as many as its budget allows, the highest scores first."""

from __future__ import annotations

import math

import torch

SINK_FRAMES = 1
"""The first frames, always read: models attend to a text's first tokens whatever is asked (StreamingLLM, arXiv
2309.17453)."""
RECENT_FRAMES = 1
"""The frames next to the question, always read."""


def frames_within(budget: float, frames: int) -> int:
    """Number of frames that a budget (share of the prefix's tokens, above 0 and up to 1) reads in each period: rounded
    down, but at least the sinks, the recent frames and one that the question chooses."""
    least = min(frames, SINK_FRAMES + RECENT_FRAMES + 1)
    return min(frames, max(least, math.floor(budget * frames + 1e-9)))


def choose(scores: torch.Tensor, count: int) -> list[int]:
    """The `count` frames to read, ascending, from the `scores` of all frames, f32 `[frames]`. A score that is not a
    number counts as zero: it must not displace the others."""
    frames = len(scores)
    if count >= frames:
        return list(range(frames))
    ranked = torch.nan_to_num(scores.float(), nan=0.0)
    ranked[:SINK_FRAMES] = math.inf
    ranked[frames - RECENT_FRAMES :] = math.inf
    return sorted(ranked.topk(count).indices.tolist())
