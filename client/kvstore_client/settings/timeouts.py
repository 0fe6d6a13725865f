"""How long a client waits, and for what."""

from pydantic import Field

from kvstore_client.settings.group import SettingsGroup


class Timeouts(SettingsGroup):
    """How long a client waits for each step, in seconds. When a limit is reached, the engine computes the KV itself."""

    lookup_s: float = Field(default=1.0, gt=0, alias="lookup_timeout_s")
    """Longest time for a lookup. The engine waits for it; afterwards it computes the prompt itself."""

    fetch_s: float = Field(default=30.0, gt=0, alias="fetch_timeout_s")
    """Longest time for a whole fetch. Chunks that have not arrived by then are computed."""

    fetch_stall_s: float = Field(default=2.0, gt=0, alias="stall_timeout_s")
    """Longest time in which a fetch receives nothing. It is then given up before its deadline."""

    failover_s: float = Field(default=0.25, gt=0)
    """Longest silence of a node in a fetch or lookup. Another node that holds the same chunks is asked then. Through
    the bulk port any byte ends the silence, through gRPC a whole piece of a range (about 50 ms of the link)."""

    put_s: float = Field(default=60.0, gt=0, alias="put_timeout_s")
    """Longest time for storing one batch of chunks. It runs in the background; the engine does not wait for it."""

    put_stall_s: float = Field(default=5.0, gt=0, alias="put_stall_timeout_s")
    """Longest time in which a node neither takes bytes of a put nor acknowledges chunks. The put to this node is given
    up then; the other owners keep the chunks."""

    calibration_s: float = Field(default=30.0, gt=0, alias="calibration_timeout_s")
    """Longest time for downloading a calibration that is not in `cache_dir` yet."""

    canary_s: float = Field(default=60.0, ge=0, alias="canary_timeout_s")
    """Longest time that the first call of a model waits until its KV has been compared with the cluster's canary. The
    comparison takes a prefill of 256 tokens. Calls before its end are computed without reuse, and their KV is not
    stored."""

    close_s: float = Field(default=10.0, ge=0, alias="close_timeout_s")
    """Longest time that closing a client waits for chunks that are still to be stored. The rest is dropped."""
