"""How much of a stored prefix a question reads."""

from typing import Final, Literal, TypeAlias

from pydantic import Field, field_validator

from kvstore_client.settings.group import SettingsGroup

AUTO: Final = "auto"
Budget: TypeAlias = float | Literal["auto"]
"""Share of a stored prefix's tokens, above 0 and up to 1; or the share that is quickest within the floor."""


class ReprefillSettings(SettingsGroup):
    """Question-guided re-prefill (docs/reprefill.md): a question reads only those parts of a stored prefix that it
    attends to."""

    budget: Budget | None = None
    """Share of a stored prefix's tokens that a question attends to and reads, such as 0.05. It changes answers. With
    `auto` share and encoding are chosen together: the quickest ones that are expected to change answers no more than
    the `floor` allows. Default: all of the prefix is reused, and answers stay the same."""

    read_ahead: bool = Field(default=False, alias="budget_read_ahead")
    """Whether a question with a `budget` chooses what the next group of layers reads one layer early, so that it is
    read while that layer is computed. Without it, the model waits for every read, and the choice is a little better
    informed."""

    cache_bytes: int = Field(default=256 << 20, ge=0, alias="frame_cache_bytes")
    """Host memory for parts of prefixes that questions with a `budget` have read, shared by all requests of the
    process."""

    device_cache_bytes: int = Field(default=0, ge=0, alias="frame_device_cache_bytes")
    """The same on the model's device, where it has memory of its own. What leaves it moves to host memory."""

    @field_validator("budget", mode="before")
    @classmethod
    def _share_or_auto(cls, value: object) -> object:
        return None if value == "" or value is None else parse_budget(value)


def parse_budget(value: object) -> Budget:
    """A budget, as users give it. Raises ValueError for what is none."""
    if value == AUTO:
        return AUTO
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"{value!r} is not a budget: expected a share above 0 and up to 1, such as .05, or {AUTO!r}"
        )
    return share
