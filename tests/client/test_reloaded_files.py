"""What is made of files that change."""

import threading
from pathlib import Path

import pytest

from kvstore_client.reloaded_files import ReloadedFiles
from kvstore_codec.errors import ConfigurationError


def test_files_that_are_being_replaced_are_read_again(tmp_path: Path) -> None:
    """A client may start between the replacement of a key and that of its certificate."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    key.write_text("new")
    certificate.write_text("old")

    def load() -> str:
        if key.read_text() != certificate.read_text():
            raise ConfigurationError("they do not belong together")
        return key.read_text()

    with pytest.raises(ConfigurationError, match="do not belong together"):
        ReloadedFiles([key, certificate], load)
    replacing = threading.Timer(0.05, lambda: certificate.write_text("new"))
    replacing.start()
    assert ReloadedFiles([key, certificate], load).current == "new"
    replacing.join()
