"""Key files: what is a key, and what is said about a wrong file."""

import logging
import os
import threading
from pathlib import Path

import pytest

from kvstore_cluster.encryption import EncryptionKey, read_keys
from kvstore_codec.errors import ConfigurationError
from tests.cluster.encryption.stores import NEW, OLD, name_of


def test_the_first_key_encrypts_and_all_decrypt(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# since May\n{NEW.hex()}\n\n{OLD.hex()}\n")
    file.chmod(0o600)
    keys = read_keys(file)
    assert keys.first == EncryptionKey(NEW)
    assert keys.names == [name_of(NEW), name_of(OLD)]
    assert keys.find(EncryptionKey(OLD).id) == EncryptionKey(OLD)
    assert keys.find(bytes(8)) is None


@pytest.mark.parametrize("content", ["", "# none", "0102", "z" * 64, f"{'01' * 32}\n" * 17])
def test_a_wrong_file_is_refused_and_not_quoted(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="openssl rand -hex 32") as error:
        read_keys(file)
    assert "0101" not in str(error.value)
    assert "zzzz" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent: No such file"):
        read_keys(tmp_path / "absent")


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    os.mkfifo(file)

    def write_and_remove() -> None:
        with file.open("w") as pipe:  # waits until the keys are read
            file.unlink()
            pipe.write(NEW.hex())

    writer = threading.Thread(target=write_and_remove)
    writer.start()
    with pytest.raises(ConfigurationError, match=r"keys: No such file"):
        read_keys(file)
    writer.join()


def test_a_file_that_everybody_can_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(NEW.hex())
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_keys(file)
    assert "chmod 600" in caplog.text
    caplog.clear()
    file.chmod(0o640)
    read_keys(file)
    assert not caplog.text


def test_a_secret_is_never_shown() -> None:
    assert NEW.hex() not in repr(EncryptionKey(NEW))
    assert repr(NEW) not in repr(EncryptionKey(NEW))
