"""Computes a question over a part of its prefix, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.contiguous.choice import SINK_FRAMES, choose
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.contiguous.scoring import FrameScores, Scorer
from kvstore_client.contiguous.summaries import scored_layers
from kvstore_client.reuse.blend.attention import CausalBlocks
from kvstore_client.reuse.engine import DecoderLayers
from kvstore_codec.errors import FetchIncompleteError
from kvstore_codec.rope import RotaryTable

SCORED_TOKENS = 128
"""Number of last question tokens whose queries choose the frames."""

AHEAD_LAYERS = 1
"""Number of layers that are computed while the next period's set is read ahead. With four, KL doubles
(docs/reprefill.md)."""

_LEAST_SHARE = 0.5
"""A set that lost more than this share of its frames is not worth an answer: the prompt is reused in full instead."""


@dataclass(frozen=True, slots=True)
class PeriodSet:
    """The frames of a period that the question attended to."""

    frames: list[int]
    """Ascending."""
    attention: list[float]
    """Share of the question's attention that each of them is estimated to receive."""


class Reprefill:
    """One question behind a stored prefix, of which each period of layers attends to its own set of frames.

    The `buffers` take the set's KV and behind it the question's, so they hold
    `count * frame_tokens + len(question)` tokens. `rotary` holds the question's positions. `scorer` is None when all
    frames are taken. Use it in inference mode, from one thread.
    """

    def __init__(
        self,
        decoder: DecoderLayers,
        question: torch.Tensor,
        grid: FrameGrid,
        count: int,
        scorer: Scorer | None,
        loader: FrameLoader,
        buffers: KVBuffers,
        rotary: RotaryTable,
        *,
        read_ahead: bool = False,
    ) -> None:
        """With `read_ahead` a period's set is chosen and requested AHEAD_LAYERS before the period begins."""
        device = decoder.device
        self._decoder, self._question = decoder, question.to(device)
        self._grid, self._count, self._scorer, self._loader = grid, count, scorer, loader
        self._keys, self._values = buffers.keys, buffers.values
        self._rotary = RotaryTable(rotary.cos.to(device), rotary.sin.to(device))
        self._reads_ahead = read_ahead
        self._chosen: list[tuple[list[int], torch.Tensor]] = []
        """The set of each period so far that was chosen, and the attention that all frames are expected to receive."""
        self.sets: list[PeriodSet] = []
        """The set of each period that was computed."""

    def compute(self, *, states: bool = False) -> torch.Tensor:
        """Compute the question. Returns the hidden state of its last token that leaves the last layer,
        `[1, 1, hidden]`; with `states` those of all its tokens, `[1, tokens, hidden]`. Raises FetchIncompleteError when
        too much of a set did not arrive."""
        decoder, grid = self._decoder, self._grid
        hidden = decoder.embed(self._question)
        for period in range(grid.periods):
            layers = grid.layers_of(period)
            if period == len(self._chosen):
                self._choose(period, hidden)
            for layer in layers:
                if layer == self._asks_at(period):
                    self._choose(period + 1, hidden)
                made = decoder.project(layer, hidden, self._rotary)
                queries = made.queries
                if layer == layers.start:
                    held = self._place(period)
                    end = held + len(self._question)
                    mask = CausalBlocks(torch.arange(held, end, device=self._keys.device), self._keys.dtype)
                self._keys[layer, :, held:end] = made.keys
                self._values[layer, :, held:end] = made.values
                if layer == decoder.layers - 1 and not states:
                    hidden, queries = hidden[:, -1:], queries[:, -1:]
                    mask = CausalBlocks(
                        torch.arange(end - 1, end, device=self._keys.device), self._keys.dtype
                    )
                attended = mask.attend(
                    queries, self._keys[layer, :, :end], self._values[layer, :, :end], decoder.scale(layer)
                )
                hidden = decoder.finish(layer, hidden, attended)
        return hidden

    def align(self) -> int:
        """Make all layers hold the same number of frames, because an engine's cache has one length: where another
        period lost frames, the least attended ones leave, too. Returns the number of prefix tokens in each layer."""
        fewest = min(len(chosen.frames) for chosen in self.sets)
        for period, chosen in enumerate(self.sets):
            if len(chosen.frames) > fewest:
                self._shrink(period, chosen, fewest)
        return fewest * self._grid.frame_tokens

    def _asks_at(self, period: int) -> int | None:
        """The layer of a period in front of which the next period's set is chosen; None: it is not chosen early."""
        if not self._reads_ahead or period + 1 == self._grid.periods:
            return None
        return self._grid.layers_of(period)[-AHEAD_LAYERS:][0]

    def _choose(self, period: int, hidden: torch.Tensor) -> None:
        """Choose a period's set by the states that enter some layer of the period before, or its own first one, and
        request it."""
        scores = self._scores(period, hidden)
        chosen = choose(scores.rank, self._count)
        self._loader.begin(period, chosen)
        self._chosen.append((chosen, scores.attention))

    def _place(self, period: int) -> int:
        """Load a period's set into the buffers. Returns the set's tokens."""
        grid, layers = self._grid, self._grid.layers_of(period)
        chosen, expected = self._chosen[period]
        loaded = self._loader.take(period, chosen)
        if len(loaded) < _LEAST_SHARE * self._count:
            raise FetchIncompleteError(f"{self._count - len(loaded)} of {self._count} frames did not arrive")
        if not loaded.keys() >= set(range(SINK_FRAMES)):
            raise FetchIncompleteError("the first frames did not arrive, which every answer attends to")
        frames = sorted(loaded)
        tokens = grid.frame_tokens
        for slot, index in enumerate(frames):
            place = slice(slot * tokens, (slot + 1) * tokens)
            self._keys[layers.start : layers.stop, :, place].copy_(loaded[index][0])
            self._values[layers.start : layers.stop, :, place].copy_(loaded[index][1])
        attention = expected[frames].tolist()
        self.sets.append(PeriodSet(frames, attention))
        self._loader.keep(period, loaded, dict(zip(frames, attention, strict=True)))
        return len(frames) * tokens

    def _scores(self, period: int, hidden: torch.Tensor) -> FrameScores:
        """Scores over the scored layers of a period, in host memory. Their queries are projected from the same states,
        which enter an earlier layer: states change little from layer to layer, and the heads that look for what is
        asked are rarely in a period's first layer."""
        if self._scorer is None:
            equal = torch.full((self._grid.frames,), 1 / self._grid.frames, device="cpu")
            return FrameScores(equal, equal)
        asking = slice(max(0, len(self._question) - SCORED_TOKENS), len(self._question))
        states, rotary = hidden[:, asking], self._rotary.at(asking)
        scores = FrameScores.of_layers(
            [
                self._scorer(layer, self._decoder.queries(layer, states, rotary), self._decoder.scale(layer))
                for layer in scored_layers(self._grid.layers_of(period))
            ]
        )
        return FrameScores(scores.attention.cpu(), scores.rank.cpu())

    def _shrink(self, period: int, chosen: PeriodSet, fewest: int) -> None:
        kept = choose(torch.tensor(chosen.attention, device="cpu"), fewest)
        tokens, layers = self._grid.frame_tokens, self._grid.layers_of(period)
        held = len(chosen.frames) * tokens
        places = [range(slot * tokens, (slot + 1) * tokens) for slot in kept]
        places.append(range(held, held + len(self._question)))
        positions = torch.tensor([*itertools.chain(*places)], device=self._keys.device)
        for tensor in (self._keys, self._values):
            part = tensor[layers.start : layers.stop]
            part[:, :, : len(positions)] = part[:, :, positions]
        self.sets[period] = PeriodSet(
            [chosen.frames[slot] for slot in kept], [chosen.attention[slot] for slot in kept]
        )


def attention_of(sets: Sequence[PeriodSet], grid: FrameGrid) -> list[float]:
    """Share of the question's attention that each chunk of the prefix receives, 0 to 1, averaged over periods."""
    shares = [0.0] * len(grid.chunks)
    for chosen in sets:
        for index, attention in zip(chosen.frames, chosen.attention, strict=True):
            shares[index // grid.frames_per_chunk] += attention / len(sets)
    return shares
