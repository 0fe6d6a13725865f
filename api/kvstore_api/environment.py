"""Environment variables of settings: ignores those that Kubernetes sets, and reads former names of settings."""

import logging
import re
from collections.abc import Iterable, Mapping

log = logging.getLogger(__name__)

_LINK = re.compile(r"(tcp|udp|sctp)://[^/]+:\d+")
_named: set[str] = set()

FORMER_DURABILITY = "kvstore_durability"
"""Former name of two settings with different meanings, one of clients and one of nodes."""


def without_service_links(
    variables: Mapping[str, str | None], settings: Iterable[str]
) -> dict[str, str | None]:
    """`variables` without those named in `settings` whose value is a Kubernetes service link.

    If a namespace has a Service `kvstore-metrics`, Kubernetes sets `KVSTORE_METRICS_PORT=tcp://10.0.0.1:9090` in every
    pod. That value is not a setting. A warning names each such variable once per process.
    """
    links = {name for name in settings if (value := variables.get(name)) and _LINK.fullmatch(value)}
    for name in sorted(links - _named):
        log.warning(
            "%s=%s is ignored: it looks like a link that Kubernetes sets for a Service of that name. "
            "Set enableServiceLinks: false in the pod, or rename the Service.",
            name.upper(), variables[name],
        )  # fmt: skip
    _named.update(links)
    return {name: value for name, value in variables.items() if name not in links}


def under_new_name(variables: Mapping[str, str | None], former: str, new: str) -> dict[str, str | None]:
    """`variables` (names in lower case) with the value of `former` moved to `new`, unless `new` has a value.

    A warning names both, once per process.
    """
    moved = dict(variables)
    value = moved.pop(former, None)
    if not value or moved.get(new):
        return moved
    if new not in _named:
        log.warning("%s is read as %s, which is its name now", former.upper(), new.upper())
        _named.add(new)
    return moved | {new: value}
