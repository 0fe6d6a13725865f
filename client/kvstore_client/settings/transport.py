"""How a client reaches the nodes."""

from pydantic import Field, field_validator

from kvstore_client.settings.group import SettingsGroup


class TransportSettings(SettingsGroup):
    """How nodes are reached, and when they are asked again."""

    routes: dict[str, str] = Field(default_factory=dict)
    """Addresses to dial instead of the advertised ones, `advertised=dial,...`, for port forwarding or link shaping."""

    membership_ttl_s: float = Field(default=5.0, gt=0)
    """Age in seconds from which the list of nodes is refreshed, in the background."""

    retry_after_s: float = Field(default=1.0, ge=0)
    """Pause in seconds after a failed lookup or fetch, in which the same node is not asked again. It grows with each
    further failure."""

    @field_validator("routes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return dict(pair.strip().split("=", 1) for pair in value.split(",") if pair.strip())
