"""What every group of settings has in common."""

from pydantic import BaseModel, ConfigDict


class SettingsGroup(BaseModel):
    """Settings of one concern. Immutable.

    The alias of a field is the name that users give, as an argument of `connect` or, with `KVSTORE_` before it, as an
    environment variable; a field without an alias goes by its own name there. The docstring of a field is what
    docs/settings.md says about it. An error never shows the value that was given: it may be a secret.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )
