"""The key file of encryption at rest, read again when it changes."""

from pathlib import Path

from kvstore_client.reloaded_files import ReloadedFiles
from kvstore_cluster.encryption import KeySource, read_keys


def open_keys(file: Path) -> KeySource:
    """Opens a key file in this process. A file that becomes unusable is logged once, and its last good content stays in
    use. Raises ConfigurationError when it is unusable at first."""
    files = ReloadedFiles([file], lambda: read_keys(file))
    return lambda: files.current
