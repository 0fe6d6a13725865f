"""How text that is reused in another context is repaired."""

from enum import StrEnum

from pydantic import Field, field_validator

from kvstore_client.settings.group import SettingsGroup


class SelectorName(StrEnum):
    """Which reused tokens are computed again where their text stands in another context (`kvstore_client.recompute`):
    `focus` and `query` by what the question attends to, `hkvd` as CacheBlend (arXiv 2405.16444), `frequency` as
    CacheTune (arXiv 2605.24022), and `frequency-high` by the other end of the spectrum, `first_k` as EPIC
    (arXiv 2410.15332), `random` to compare with."""

    FOCUS = "focus"
    QUERY = "query"
    HKVD = "hkvd"
    FREQUENCY = "frequency"
    FREQUENCY_HIGH = "frequency-high"
    FIRST_K = "first_k"
    RANDOM = "random"

    @property
    def needs_order(self) -> bool:
        """Whether it goes by an order of tokens that is stored with each chunk."""
        return self in (SelectorName.FREQUENCY, SelectorName.FREQUENCY_HIGH)


class RecomputeSettings(SettingsGroup):
    """Which tokens of text that is reused in another context are computed again (docs/recompute.md)."""

    selector: SelectorName = Field(default=SelectorName.FOCUS, alias="recompute_selector")
    """Which of these tokens are computed again: `focus`, `query`, `hkvd`, `frequency`, `frequency-high`, `first_k` or
    `random`. With a `frequency` selector new chunks are stored with an order of their tokens."""

    ratio: float | None = Field(default=None, ge=0, le=1, alias="recompute_ratio")
    """Share of these tokens that is computed again, 0 to 1. Default: the fastest ratio that `kvstore tune` found for
    the tier the text is stored in, else `recompute_floor`."""

    floor: float = Field(default=0.15, ge=0, le=1, alias="recompute_floor")
    """Smallest ratio that may be chosen for speed, 0 to 1. Answers get worse below it."""

    drift: bool = Field(default=True, alias="recompute_drift")
    """Whether the change of KV seen at the recomputed tokens is spread to their neighbours."""

    disk_tier: str | None = None
    """Tier that `kvstore tune` measured on disks like those of the nodes: `disk`, `ssd` or `hdd`. It gives the ratio
    for text that is stored on a disk. Default: `disk`, or `ssd` where only that one was tuned."""

    @field_validator("ratio", "disk_tier", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value
