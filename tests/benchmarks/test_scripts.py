"""The scripts in `benchmarks/` find what they import."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_loaded(script: Path) -> None:
    assert runpy.run_path(str(script), run_name="loaded")["__doc__"]
