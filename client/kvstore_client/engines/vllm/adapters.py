"""LoRA adapters of requests, as the scheduler's half names them: by what they compute. Their files are read beside the
engine, once for each path."""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kvstore_client.engines.adapter import Adapter, read_adapter
from kvstore_client.miss_reason import MissReason
from kvstore_client.settings import ClientSettings
from kvstore_client.threads import single_threaded
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import KVStoreError, UnsupportedModelError

log = logging.getLogger(__name__)

_MOST_ADAPTERS = 16_384
"""The digest of the one that was met first is forgotten when there are more, and computed again."""
_MOST_AT_ONCE = 2
_REPEATED_AFTER_S = 30.0
"""An adapter that could not be read is read again, when a request uses it so long after the last time."""
_CHANGES_MEANING = (
    "target_modules",
    "enable_tower_connector_lora",
    "enable_mixed_moe_lora_format",
    "enable_moe_shared_loras",
)
"""What in vLLM's LoRAConfig decides what the engine makes of an adapter's files, besides the dtype."""


@dataclass(frozen=True, slots=True)
class UnusableAdapter:
    """An adapter whose requests are neither read nor stored."""

    reason: MissReason
    why: str
    """A sentence for people."""


class Adapters:
    """The adapters of one engine. Used by the scheduler's thread; waits for nothing."""

    def __init__(self, lora_config: Any, settings: ClientSettings) -> None:
        """`lora_config` is vLLM's; None where the engine serves no adapters."""
        self._config, self._cache_dir = lora_config, settings.cache_dir
        self._needs_calibration = any(
            Encoding.parse(name).needs_calibration for name in settings.encodings.stored
        )
        self._readings: OrderedDict[tuple[str, bool], _Reading] = OrderedDict()
        self._running: list[_Reading] = []

    def find(self, asked: Any) -> Adapter | UnusableAdapter | None:
        """The adapter of a vLLM LoRARequest. None while it is being read, or waits to be."""
        if self._needs_calibration:
            return UnusableAdapter(
                MissReason.ADAPTER_UNCALIBRATED,
                "a calibration is of the model without LoRA adapter; store exact-zstd to reuse requests with one",
            )
        if self._config is None or getattr(asked, "tensorizer_config_dict", None):
            return UnusableAdapter(
                MissReason.ADAPTER_UNREADABLE, f"{asked.lora_name} is not in files of a folder"
            )
        key = asked.lora_path, bool(getattr(asked, "is_3d_lora_weight", False))
        reading = self._readings.get(key)
        if reading is None or reading.is_to_be_repeated():
            reading = self._begin(key)
        return reading.result if reading is not None else None

    def _begin(self, key: tuple[str, bool]) -> "_Reading | None":
        self._running = [reading for reading in self._running if not reading.adapter.done()]
        if len(self._running) >= _MOST_AT_ONCE:
            return None
        reading = _Reading(Future(), time.monotonic())
        # A daemon: it waits for a disk at most, and an engine that shuts down must not.
        thread = threading.Thread(
            target=self._read, args=(*key, reading.adapter), name="kvstore-adapter", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no thread left; tried again
            return None
        self._running.append(reading)
        self._readings[key] = reading
        while len(self._readings) > _MOST_ADAPTERS:
            self._readings.popitem(last=False)
        return reading

    @single_threaded()
    def _read(self, path: str, is_3d: bool, adapter: "Future[Adapter]") -> None:
        try:
            found = read_adapter(
                _folder(path), self._config.lora_dtype, self._settings(is_3d=is_3d), self._cache_dir
            )
        except Exception as error:  # a bug in this package must not leave anybody waiting
            if not isinstance(error, KVStoreError):
                log.exception("the adapter in %s could not be read", path)
            adapter.set_exception(error)
        else:
            adapter.set_result(found)

    def _settings(self, *, is_3d: bool) -> Mapping[str, Any]:
        told = {name: getattr(self._config, name, None) for name in _CHANGES_MEANING}
        modules = told["target_modules"]
        return told | {"target_modules": modules and sorted(modules), "is_3d_lora_weight": is_3d}


@dataclass(frozen=True, slots=True)
class _Reading:
    """An adapter that is read, or was."""

    adapter: "Future[Adapter]"
    begun_s: float
    """On the clock of `time.monotonic`."""

    @property
    def result(self) -> Adapter | UnusableAdapter | None:
        """None as long as nothing is known."""
        if not self.adapter.done():
            return None
        if (error := self.adapter.exception()) is not None:
            return UnusableAdapter(MissReason.ADAPTER_UNREADABLE, str(error))
        return self.adapter.result()

    def is_to_be_repeated(self) -> bool:
        is_failed = self.adapter.done() and self.adapter.exception() is not None
        return is_failed and time.monotonic() > self.begun_s + _REPEATED_AFTER_S


def _folder(path: str) -> str:
    """The folder that vLLM loads the adapter from. Raises UnsupportedModelError for the name of a repository, whose
    folder depends on what its host says when vLLM asks it."""
    if path.startswith("~"):
        return os.path.expanduser(path)  # noqa: PTH111  # written as vLLM writes it, which also compares it
    if not os.path.isabs(path) and not os.path.exists(path):  # noqa: PTH110, PTH117
        raise UnsupportedModelError(f"the adapter {path} is not a folder on this machine")
    return os.path.abspath(path) if not os.path.isabs(path) else path  # noqa: PTH100, PTH117
