"""The scripts in `benchmarks/` find what they import, and say so where there is nothing to measure."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_service.doctor.machine import cuda

FOLDER = Path(__file__).parents[2] / "benchmarks"
GPU_SCRIPTS = sorted((FOLDER / "gpu").glob("*.py"))
SCRIPTS = [*sorted(FOLDER.glob("*.py")), *GPU_SCRIPTS]


def named(script: Path) -> str:
    return str(script.relative_to(FOLDER))


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_script_can_be_loaded(script: Path) -> None:
    assert runpy.run_path(str(script), run_name="loaded")["__doc__"]


@pytest.mark.slow
@pytest.mark.skipif(cuda().available, reason="this machine has a GPU")
@pytest.mark.parametrize("script", GPU_SCRIPTS, ids=named)
def test_without_a_gpu_nothing_is_measured(script: Path) -> None:
    done = subprocess.run((sys.executable, script), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing to measure: ")


@pytest.mark.slow
@pytest.mark.skipif(cuda().available, reason="this machine has a GPU")
def test_the_reason_for_measuring_nothing_of_vllm_is_one_sentence() -> None:
    done = subprocess.run(
        (sys.executable, FOLDER / "gpu" / "vllm.py"), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"nothing to measure: {cuda().detail}\n"
