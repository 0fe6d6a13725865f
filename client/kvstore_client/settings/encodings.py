"""Which encodings a client stores and which it accepts."""

from pydantic import Field, ValidationInfo, field_validator

from kvstore_client.settings.group import SettingsGroup
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import UnknownEncodingError

EXACT = "exact-zstd"


class EncodingSettings(SettingsGroup):
    """Encodings that new chunks are stored in, and encodings that a fetch may use."""

    stored: tuple[str, ...] = Field(default=(EXACT,), alias="encoding")
    """Encoding of new chunks. Several, separated by commas, are stored side by side, and a fetch takes the one that
    suits the link. An encoding with `klt` in its name needs a calibration of the model in the cluster."""

    accept: tuple[str, ...] = Field(default=(), validate_default=True)
    """Encodings that a fetch may use, separated by commas; of equally faithful ones the first is preferred. Default:
    the encodings of `encoding`, then `exact-zstd`. So a lossy encoding that is stored is also accepted."""

    floor: Rate | None = None
    """Least faithful rate that a fetch may use: `exact`, `high`, `medium` or `low`. When given, it replaces `accept`,
    which then only adds encodings of an explicit step. Default: `accept` decides. With the `budget` `auto` it also
    limits how much of a prefix is left out."""

    @property
    def loss(self) -> float:
        """Largest expected KL divergence of answers that these settings allow, nats per token: that of the floor, or
        else of the least faithful accepted rate."""
        if self.floor is not None:
            return self.floor.loss
        rates = (Encoding.parse(name).rate for name in self.accept)
        return max((rate.loss for rate in rates if isinstance(rate, Rate)), default=0.0)

    def accepts(self, name: str) -> bool:
        """Whether a fetch may use chunks in this encoding; False also for a name that means nothing."""
        if self.floor is None:
            return name in self.accept
        try:
            encoding = Encoding.parse(name)
        except UnknownEncodingError:
            return False
        if isinstance(encoding.rate, Rate):
            return encoding.rate.is_at_least(self.floor)
        return name in self.accept

    @field_validator("stored", "accept", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("stored", "accept")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                Encoding.parse(name)
            except UnknownEncodingError as error:
                raise ValueError(str(error)) from error
        return tuple(dict.fromkeys(value))

    @field_validator("stored")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("new chunks need an encoding to be stored in")
        return value

    @field_validator("accept")
    @classmethod
    def _what_is_stored(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return value or tuple(dict.fromkeys((*info.data.get("stored", ()), EXACT)))

    @field_validator("floor", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value
