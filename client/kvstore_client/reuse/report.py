"""Report of a call's reuse, with the reason when nothing was reused."""

from collections import Counter
from dataclasses import dataclass

from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.fetch import FetchReport
from kvstore_client.timeline import Timeline


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What one `generate` call reused."""

    prompt_tokens: int
    reused_tokens: int
    timeline: Timeline
    fetch: FetchReport | None = None
    bypassed: str | None = None
    """Why the call ran without reuse."""
    why_not: str | None = None
    """Why nothing was reused, if nothing was: a word and a sentence, such as `not stored`, `bypassed: batch` or
    `unreachable: the coordinator at 127.0.0.1:7420 refused the connection`."""
    approximate_tokens: int = 0
    """Tokens of text that was stored in another context, including the recomputed ones."""
    recomputed_tokens: int = 0
    """Approximate tokens that were recomputed; `reused_tokens` does not count them."""
    reprefill: ReprefillReport | None = None
    """What was read, where the prompt attended to a part of its prefix only; `reused_tokens` is then all of the
    prefix."""

    @property
    def exact_tokens(self) -> int:
        """Tokens reused in the context that they were computed in."""
        return self.reused_tokens - (self.approximate_tokens - self.recomputed_tokens)


def why_nothing_reused(reused_tokens: int, fetch: FetchReport | None, not_begun: str | None) -> str | None:
    """Why nothing of a prompt was reused; None when something was. `not_begun` is the reason why there was no fetch."""
    if reused_tokens:
        return None
    if fetch is not None and fetch.missing:
        reasons = Counter(fetch.missing.values()).most_common()
        return "not fetched: " + ", ".join(f"{reason} ({chunks} chunks)" for reason, chunks in reasons)
    if fetch is not None:
        return "slower: computing is faster than fetching"
    return not_begun
