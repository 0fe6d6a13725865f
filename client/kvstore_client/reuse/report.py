"""What reuse did for a call, and why it did nothing."""

from collections import Counter
from dataclasses import dataclass

from kvstore_client.fetch import FetchReport
from kvstore_client.timeline import Timeline


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What reuse did for one `generate` call."""

    prompt_tokens: int
    reused_tokens: int
    timeline: Timeline
    fetch: FetchReport | None = None
    bypassed: str | None = None
    """Why the call was passed through without reuse."""
    why_not: str | None = None
    """Why nothing was reused, if nothing was: a word and a sentence, such as `not stored`, `bypassed: batch` or
    `unreachable: the coordinator at 127.0.0.1:7420 refused the connection`."""
    approximate_tokens: int = 0
    """Tokens of text that was stored in another context; some of them were computed again."""
    recomputed_tokens: int = 0
    """Approximate tokens that were computed again; `reused_tokens` does not count them."""

    @property
    def exact_tokens(self) -> int:
        """Reused in the very context that they were computed in."""
        return self.reused_tokens - (self.approximate_tokens - self.recomputed_tokens)


def why_nothing_reused(reused_tokens: int, fetch: FetchReport | None, not_begun: str | None) -> str | None:
    """Why nothing of a prompt was reused; None when something was. `not_begun` says why there was no fetch, if there
    was none."""
    if reused_tokens:
        return None
    if fetch is not None and fetch.missing:
        reasons = Counter(fetch.missing.values()).most_common()
        return "not fetched: " + ", ".join(f"{reason} ({chunks} chunks)" for reason, chunks in reasons)
    if fetch is not None:
        return "slower: computing is sooner than fetching"
    return not_begun
