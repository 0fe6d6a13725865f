"""Connectors with which two engines of one model exchange KV through a store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvstore_bench.vllm.engine import Connector
from kvstore_bench.vllm.policies import (
    EXACT_SETTINGS,
    LOSSY_SETTINGS,
    kvstore_connector,
    offloading_connector,
)
from kvstore_codec.errors import ConfigurationError

NAMES = ("vllm", "exact", "adaptive", "offloading")
_HOST_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Setup:
    name: str
    make: Callable[[str, Path], Connector] | None
    """Of the store's address and a folder for caches. None: vLLM alone, in one engine."""
    layout: str | None = None
    """vLLM's name of a KV cache layout, such as NHD; None leaves the choice to vLLM."""
    is_exact: bool = False
    """Whether the second engine has to hold the very bytes of the first one."""
    is_ours: bool = False
    """Whether the connector is this project's, so that `worker_extension.py` finds the registered memory."""
    needs_calibration: bool = False

    @property
    def label(self) -> str:
        return self.name if self.layout is None else f"{self.name}-{self.layout}"

    @property
    def about(self) -> dict[str, Any]:
        """Fields of a row."""
        return {"connector": self.name, "kv_layout": self.layout}

    def connector(self, address: str, folder: Path) -> Connector | None:
        if self.make is None:
            return None
        made = self.make(address, folder)
        chosen = {} if self.layout is None else {"VLLM_KV_CACHE_LAYOUT": self.layout}
        return replace(made, environment={**made.environment, **chosen})


def setups(names: str, model: Path, layouts: Sequence[str | None]) -> list[Setup]:
    """Of comma-separated NAMES; `exact` once for each of the layouts. Raises ConfigurationError for an unknown name."""
    every = {
        "vllm": [Setup("vllm", None)],
        # Each prompt is loaded, however slow that is: this is the check that what is loaded is right.
        "exact": [
            Setup(
                "exact",
                _ours({**EXACT_SETTINGS, "fetch_policy": "fixed"}),
                layout,
                is_exact=True,
                is_ours=True,
            )
            for layout in layouts
        ],
        "adaptive": [Setup("adaptive", _ours(LOSSY_SETTINGS), is_ours=True, needs_calibration=True)],
        "offloading": [
            Setup("offloading", partial(offloading_connector, model=model, host_bytes=_HOST_BYTES))
        ],
    }
    found: list[Setup] = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        if name not in every:
            raise ConfigurationError(f"there is no connector {name!r}; choose from {', '.join(NAMES)}")
        found += every[name]
    return found


def _ours(settings: Mapping[str, Any]) -> Callable[[str, Path], Connector]:
    return lambda address, folder: kvstore_connector(address, folder, settings)
