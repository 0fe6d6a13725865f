"""How much of a stored prefix a question reads."""

from pydantic import Field, field_validator

from kvstore_client.settings.group import SettingsGroup


class ReprefillSettings(SettingsGroup):
    """Question-guided re-prefill (docs/reprefill.md): a question reads only those parts of a stored prefix that it
    attends to."""

    budget: float | None = Field(default=None, gt=0, le=1)
    """Share of a stored prefix's tokens that a question attends to and reads, such as 0.05. It changes answers.
    Default: all of the prefix is reused, and answers stay the same."""

    read_ahead: bool = Field(default=True, alias="budget_read_ahead")
    """Whether a question with a `budget` reads what the next layers probably need while the present ones are computed.
    A part of that, a quarter with SmolLM2, is read for nothing."""

    cache_bytes: int = Field(default=256 << 20, ge=0, alias="frame_cache_bytes")
    """Host memory for parts of prefixes that questions with a `budget` have read, shared by all requests of the
    process."""

    device_cache_bytes: int = Field(default=0, ge=0, alias="frame_device_cache_bytes")
    """The same on the model's device, where it has memory of its own. What leaves it moves to host memory."""

    @field_validator("budget", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value
