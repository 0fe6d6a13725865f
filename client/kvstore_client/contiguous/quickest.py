"""Chooses how much of a prefix a question reads, and in which encoding: the quickest pair within a limit of loss.

A part and the whole prefix are compared by the time model that fetches are planned with. Fewer tokens and fewer bits
both cost answers something; both losses are expected KL divergences, which are added (docs/reprefill.md has the
measurement).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore_client.contiguous.choice import frames_within
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.match import Match, StoredChunk, Variant
from kvstore_client.planning import (
    AdaptivePlanner,
    ChunkWork,
    Costs,
    DEFAULT_BANDWIDTH_Bps,
    Links,
    Option,
    Profile,
    Work,
)
from kvstore_client.planning.adaptive import TIE
from kvstore_client.planning.losses import PartLosses
from kvstore_client.planning.predict import predict
from kvstore_codec.encoding import Rate


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to read a prefix."""

    grid: FrameGrid | None
    """The frames of the whole prefix in the chosen encoding; None: the whole prefix is fetched as without a budget."""
    budget: float
    """Share of the prefix that is attended to."""
    loss: float
    """Expected KL divergence, nats per token."""
    predicted_s: float
    """Expected seconds until the question is computed."""


class QuickestChoice:
    """Predicts and compares. Stateless, apart from the costs and links that it looks at."""

    def __init__(self, costs: Costs, links: Links) -> None:
        self._costs, self._links = costs, links

    def of_share(self, grids: Sequence[FrameGrid], share: float, question_tokens: int) -> FrameGrid:
        """The grid in which a part of this share is there soonest; the first one that ties with it, as more faithful
        ones come first."""
        profile = self._costs.snapshot()
        seconds = [self._part_s(grid, share, question_tokens, profile) for grid in grids]
        return next(g for g, s in zip(grids, seconds, strict=True) if s <= TIE * min(seconds))

    def within(
        self,
        grids: Sequence[FrameGrid],
        match: Match,
        question_tokens: int,
        losses: PartLosses,
        limit: float,
        summary_bytes: int,
    ) -> Choice:
        """The quickest way whose expected loss is within the limit, or the whole prefix; of ways that tie the one that
        loses least. `summary_bytes` are to be read before a part can be chosen."""
        profile = self._costs.snapshot()
        summaries_s = self._summaries_s(match, summary_bytes)
        found = [self._whole(match, question_tokens, profile)]
        for grid in grids:
            rate = grid.variants[0].header.encoding.rate
            if not isinstance(rate, Rate):
                continue  # nobody knows what an explicit step loses
            for share in losses.shares:
                count = frames_within(share, grid.frames)
                loss = rate.loss + losses.at(max(share, count / grid.frames))
                if count < grid.frames and loss <= limit:
                    seconds = self._part_s(grid, count / grid.frames, question_tokens, profile)
                    found.append(Choice(grid, share, loss, seconds + summaries_s))
        quickest_s = min(choice.predicted_s for choice in found)
        return min(
            (choice for choice in found if choice.predicted_s <= TIE * quickest_s), key=lambda c: c.loss
        )

    def _whole(self, match: Match, question_tokens: int, profile: Profile) -> Choice:
        work = self._work(((c, c.variants) for c in match.chunks), 1.0, question_tokens, profile)
        plan = AdaptivePlanner().plan(work)
        used = [c.variants[plan.choices[i]] for i, c in enumerate(match.chunks) if plan.choices[i] >= 0]
        rates = [variant.header.encoding.rate for variant in used]
        loss = max((rate.loss for rate in rates if isinstance(rate, Rate)), default=0.0)
        return Choice(None, 1.0, loss, plan.predicted_s)

    def _part_s(self, grid: FrameGrid, share: float, question_tokens: int, profile: Profile) -> float:
        variants = ((variant,) for variant in grid.variants)
        work = self._work(zip(grid.chunks, variants, strict=True), share, question_tokens, profile)
        plan = predict(work, dict.fromkeys(range(len(grid.chunks)), 0), "layers")
        # Each period asks once more, for what was not read ahead.
        return plan.predicted_s + grid.periods * max(work.latencies_s.values(), default=0.0)

    def _work(
        self,
        offers: Iterable[tuple[StoredChunk, Sequence[Variant]]],
        share: float,
        question_tokens: int,
        profile: Profile,
    ) -> Work:
        """Reading this share of each chunk, and computing the question behind it."""
        chunks: list[ChunkWork] = []
        end = 0
        for index, (chunk, variants) in enumerate(offers):
            tokens = chunk.header.geometry.tokens
            options = tuple(_option(variant, share, profile) for variant in variants)
            chunks.append(
                ChunkWork(
                    index, end, int(share * tokens), chunk.member.endpoint, options, computable=share == 1
                )
            )
            end += chunks[-1].tokens
        endpoints = {chunk.endpoint for chunk in chunks}
        bandwidths = {endpoint: self._links.bandwidth_Bps(endpoint) for endpoint in endpoints}
        return Work(
            tuple(chunks),
            end,
            question_tokens,
            {endpoint: known for endpoint, known in bandwidths.items() if known is not None},
            {endpoint: self._links.latency_s(endpoint) for endpoint in endpoints},
            profile.prefill,
            profile.interference,
            profile.decode_threads,
        )

    def _summaries_s(self, match: Match, summary_bytes: int) -> float:
        """Seconds to read key summaries, which lie on the nodes of their chunks."""
        if not summary_bytes:
            return 0.0
        endpoints = {chunk.member.endpoint for chunk in match.chunks}
        each_bytes = summary_bytes / len(endpoints)
        return max(
            self._links.latency_s(endpoint)
            + each_bytes / (self._links.bandwidth_Bps(endpoint) or DEFAULT_BANDWIDTH_Bps)
            for endpoint in endpoints
        )


def _option(variant: Variant, share: float, profile: Profile) -> Option:
    header = variant.header
    size_bytes = int(share * (header.size_bytes - header.header_bytes))
    cost, tokens = profile.codec(header.encoding.name), share * header.geometry.tokens
    decode_s = cost.decode_s * tokens + profile.receive_s_per_byte * size_bytes
    return Option(header.encoding.name, size_bytes, decode_s, cost.restore_s * tokens)
