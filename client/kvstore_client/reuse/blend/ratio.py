"""Recompute ratio of a prompt when the caller gives none: the settings' ratio, else the one tuned for the storage tier.
Where recomputed tokens need not be fetched, it then follows the link's bandwidth."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore_client.match import Match, bytes_of_endpoints
from kvstore_client.planning import Links
from kvstore_client.recompute import Recompute, selector
from kvstore_client.recompute.controller import RatioOnline
from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import Tuned
from kvstore_client.reuse.blend.worth import MOST_COMPUTED
from kvstore_client.settings import ClientSettings

DRAM, DISK = "dram", "disk"
_LIKE_DISK = "ssd"
"""Tier whose ratio stands for unknown disks while only disks of known speed were tuned."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Tuned ratios of one model, and its online controllers."""

    digest: bytes
    of_tier: Mapping[str, RatioOnline]


class Ratios:
    """Recompute ratios of one client and engine. Tuned ratios are read at a model's first use. Thread-safe."""

    def __init__(self, settings: ClientSettings, links: Links) -> None:
        self._settings, self._links = settings, links
        self._follows_link = (
            not settings.recompute.drift and not selector(settings.recompute.selector).needs_kv
        )
        """Without this every token is fetched, and a higher ratio saves no transfer."""
        self._known: _Known | None = None

    def recompute(self, model_digest: bytes, match: Match) -> Recompute:
        """How the chunks of `match` are repaired."""
        settings = self._settings
        ratio = settings.recompute.ratio
        if ratio is None:
            ratio = self._ratio(model_digest, match)
        return Recompute(settings.recompute.selector, ratio, settings.recompute.drift)

    def computed(self, tokens: int, seconds: float) -> None:
        """Record that this many tokens passed through the model in `seconds`, without the waits for KV."""
        if self._known is not None:
            for online in self._known.of_tier.values():
                online.computed(tokens, seconds)

    def _ratio(self, model_digest: bytes, match: Match) -> float:
        known = self._known
        if known is None or known.digest != model_digest:
            self._known = known = self._read(model_digest)
        online = known.of_tier[tier_of(match)]
        if not self._follows_link or not match.chunks:
            return online.ratio(0, None)
        return online.ratio(_bytes(match) / match.tokens, self._bandwidth_Bps(match))

    def _read(self, model_digest: bytes) -> _Known:
        tuned = TunedRatios(self._settings.cache_dir).load(model_digest)
        found = {DRAM: tuned.get(DRAM), DISK: self._of_disk(tuned)}
        floor = self._settings.recompute.floor
        return _Known(
            model_digest,
            {
                tier: RatioOnline(
                    floor if one is None else one.ratio, least=floor, most=max(floor, MOST_COMPUTED)
                )
                for tier, one in found.items()
            },
        )

    def _of_disk(self, tuned: Mapping[str, Tuned]) -> Tuned | None:
        if self._settings.recompute.disk_tier is not None:
            return tuned.get(self._settings.recompute.disk_tier)
        return tuned.get(DISK) or tuned.get(_LIKE_DISK)

    def _bandwidth_Bps(self, match: Match) -> float | None:  # noqa: N802
        """Effective bandwidth of all endpoints together, which send in parallel: until the last one has sent its
        share."""
        sizes = bytes_of_endpoints(match.chunks)
        slowest_s = 0.0
        for endpoint, size in sizes.items():
            bandwidth_Bps = self._links.bandwidth_Bps(endpoint)  # noqa: N806
            if not bandwidth_Bps:
                return None
            slowest_s = max(slowest_s, size / bandwidth_Bps)
        return sizes.total() / slowest_s if slowest_s else None


def tier_of(match: Match) -> str:
    """Tier that holds most of the match's bytes."""
    on_disk = sum(chunk.body_bytes for chunk in match.chunks if chunk.on_disk)
    return DISK if 2 * on_disk > _bytes(match) else DRAM


def _bytes(match: Match) -> int:
    return sum(chunk.body_bytes for chunk in match.chunks)
