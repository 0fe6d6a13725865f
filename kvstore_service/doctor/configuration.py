"""Check of the KVSTORE_* environment variables."""

import difflib
import os
import re

from kvstore_api.environment import FORMER_DURABILITY
from kvstore_client.settings import settings_by_name
from kvstore_service.doctor.finding import Finding, missing, present
from kvstore_service.settings import PREFIX, Settings, port_variable, variable

# Variables that Kubernetes sets for a Service whose name begins with `kvstore`.
_SERVICE_LINK = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_MOST_SHOWN = 10


def variables() -> Finding:
    """Checks that every KVSTORE_* variable is a setting, because a misspelt one is ignored."""
    known = {variable(name) for name in Settings.model_fields}
    known |= {setting.variable for setting in settings_by_name().values()} | {FORMER_DURABILITY.upper()}
    found = {name.upper() for name in os.environ if name.upper().startswith(PREFIX)}
    links = {name for name in found - known if _SERVICE_LINK.fullmatch(name)}
    wrong_port = port_variable()
    if wrong_port is not None:
        return missing(wrong_port, "It is ignored: unset it.")
    unknown = sorted(found - known - links)
    if not unknown:
        ignored = f"; {len(links)} service links of Kubernetes are ignored" if links else ""
        return present(f"{len(found & known)} set, all known{ignored}")
    hints = [
        f"{name} (did you mean {close[0]}?)" if (close := difflib.get_close_matches(name, known, 1)) else name
        for name in unknown[:_MOST_SHOWN]
    ]
    more = f" and {len(unknown) - _MOST_SHOWN} more" if len(unknown) > _MOST_SHOWN else ""
    return missing(f"unknown variables: {', '.join(hints)}{more}", "They are ignored: correct or unset them.")
