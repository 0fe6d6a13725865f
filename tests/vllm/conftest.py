"""Tests that need vLLM. It pins its own PyTorch, so they run in .venv-vllm: `make test-vllm`."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.vllm.processes import StoreProcess, free_port

_NEED_VLLM = (
    "adapter_loads",
    "adapters",
    "adaptive_loads",
    "connector",
    "divergence",
    "engine",
    "engine_adapters",
    "engine_canary",
    "events",
    "exchange",
    "hooks",
    "loads",
    "lossy",
    "naming",
    "preemption",
    "probe_watch",
    "scheduler_changes",
    "scheduler_half",
    "server_metrics",
    "stats",
    "tier",
)

collect_ignore = [] if find_spec("vllm") else [f"test_{name}.py" for name in _NEED_VLLM]
"""Modules that import vLLM."""


@pytest.fixture(scope="session", autouse=True)
def vllm_kernels() -> None:
    pytest.importorskip("vllm", reason="vLLM is installed in .venv-vllm only; run make test-vllm")
    from vllm.platforms import current_platform

    current_platform.import_kernels()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    process = StoreProcess(tmp_path_factory.mktemp("store"), free_port())
    yield process
    process.close()
