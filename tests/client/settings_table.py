"""docs/settings.md, from the settings themselves: `python -m tests.client.settings_table > docs/settings.md`."""

from kvstore_client.settings import Setting, settings_by_name

_HEAD = """\
# Settings of a client

A setting is an argument of `connect(...)` or an environment variable. The argument has the name of the variable in
small letters, without `KVSTORE_`: `connect(lookup_timeout_s=2)` and `KVSTORE_LOOKUP_TIMEOUT_S=2` mean the same. An
argument wins over a variable. An empty variable counts as not given. `~` in a path is the user's home folder. Times are
in seconds, sizes in bytes.

Code reads settings in groups: `client.settings.timeouts.lookup_s`. The groups are the files in
[`client/kvstore_client/settings/`](../client/kvstore_client/settings). This table is made from them
(`python -m tests.client.settings_table > docs/settings.md`), and a test compares it.

| variable | in code | default | meaning |
| --- | --- | --- | --- |
"""


def settings_page() -> str:
    """The whole of docs/settings.md."""
    return _HEAD + "".join(map(_row, settings_by_name().values()))


def _row(setting: Setting) -> str:
    place = setting.attribute if setting.group is None else f"{setting.group}.{setting.attribute}"
    meaning = " ".join((setting.info.description or "").split())
    return f"| `{setting.variable}` | `{place}` | {_default(setting)} | {meaning} |\n"


def _default(setting: Setting) -> str:
    value = setting.info.default
    if (
        setting.info.default_factory is not None
        or value is None
        or value in ((), "")
        or setting.name == "tenant_salt"
    ):
        return ""
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if setting.name.endswith("_bytes"):
        return f"`{value}` ({value >> 20} MiB)"
    return f"`{','.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(settings_page(), end="")
