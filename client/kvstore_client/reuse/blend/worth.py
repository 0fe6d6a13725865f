"""Decides whether reusing a prompt's segments is faster than a prefill, and in which encoding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore_client.match import StoredChunk, bytes_of_endpoints
from kvstore_client.planning import DEFAULT_BANDWIDTH_Bps, Links, Profile
from kvstore_client.recompute import selector
from kvstore_client.reuse.blend.plan import SegmentPlan

MOST_COMPUTED = 0.6
"""Largest share of a prompt's tokens to compute. Above it reuse saves less than its overhead, and the prompt is
prefilled."""

_SCATTERED = 1.5
"""Slowdown of attention for tokens that are not contiguous: it cannot skip as much as a causal pass."""


@dataclass(frozen=True, slots=True)
class Work:
    """Work that reuse leaves to the model."""

    question: int
    """Number of the question's tokens."""
    computed: int
    """Number of tokens that are not reused, including the question's."""
    recomputed: int
    """Number of reused tokens that are recomputed."""
    looks: bool
    """Whether the question passes through the model twice."""

    @classmethod
    def of(cls, plan: SegmentPlan, total: int) -> "Work":
        approximate = sum(chunk.header.geometry.tokens for chunk in plan.match.chunks if not chunk.exact)
        return cls(
            total - plan.question,
            total - plan.match.tokens,
            int(plan.recompute.ratio * approximate),
            looks=bool(approximate) and selector(plan.recompute.selector).needs_kv,
        )

    @property
    def passed(self) -> int:
        """Tokens that pass through the model, counted once per pass."""
        return self.computed + self.recomputed + (self.question if self.looks else 0)


def worth_reusing(
    plan: SegmentPlan, total: int, profile: Profile | None, links: Links, decode_threads: int
) -> SegmentPlan | None:
    """The plan with each chunk in the usable encoding that arrives first; None when a prefill is faster. Without a
    `profile` of the model's costs, chunks are fetched in their first encoding."""
    work = Work.of(plan, total)
    if not plan.match.chunks or work.passed > MOST_COMPUTED * total:
        return None
    if profile is None:
        return plan
    prefill = profile.prefill
    computing_s = (
        prefill.fixed_s * (2 + work.looks)
        + prefill.per_token_s * work.passed
        + _SCATTERED * prefill.per_pair_s * (work.computed + work.recomputed) * total / 2
        + prefill.per_pair_s * work.question * total * work.looks
    )
    names = [{variant.header.encoding.name for variant in chunk.variants} for chunk in plan.match.chunks]
    best: tuple[float, tuple[StoredChunk, ...]] | None = None
    for name in dict.fromkeys(
        variant.header.encoding.name for c in plan.match.chunks for variant in c.variants
    ):
        if all(name in available for available in names):
            chunks = tuple(_only(chunk, name) for chunk in plan.match.chunks)
            seconds = _fetch_s(chunks, profile, links, decode_threads)
            # The most faithful encodings come first: a later one must be clearly faster.
            if best is None or seconds + computing_s < 0.8 * (best[0] + computing_s):
                best = seconds, chunks
    fetch_s, chunks = best or (_fetch_s(plan.match.chunks, profile, links, decode_threads), plan.match.chunks)
    prefill_s = prefill.seconds(0, total)
    if fetch_s + computing_s > prefill_s:
        return None
    return replace(plan, match=replace(plan.match, chunks=chunks), prefill_s=prefill_s)


def _only(chunk: StoredChunk, name: str) -> StoredChunk:
    variants = tuple(variant for variant in chunk.variants if variant.header.encoding.name == name)
    return replace(chunk, variants=variants)


def _fetch_s(chunks: Sequence[StoredChunk], profile: Profile, links: Links, decode_threads: int) -> float:
    """Seconds until all chunks have arrived, each in its first variant: endpoints send, and threads decode, in
    parallel."""
    decode_s = 0.0
    for chunk in chunks:
        header = chunk.header
        cost = profile.codec(header.encoding.name)
        decode_s += header.geometry.tokens * (cost.decode_s + cost.restore_s)
    receive_s = max(
        links.latency_s(endpoint) + size / (links.bandwidth_Bps(endpoint) or DEFAULT_BANDWIDTH_Bps)
        for endpoint, size in bytes_of_endpoints(chunks).items()
    )
    return max(receive_s, decode_s / max(1, decode_threads))
