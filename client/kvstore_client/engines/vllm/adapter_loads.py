"""Which files of LoRA adapters this process has loaded.

The name of a chunk says which adapter its KV was computed with. A path alone does not: vLLM loads an adapter before its
first request, drops it when there are others, loads it again, or loads another one in its place, and the files may
change at any time between. It tells a connector none of that. But Python tells who asks of each file that it opens
(`sys.addaudithook`), and vLLM opens the configuration of an adapter just before it reads the weights. What the files
are at that moment is what the engine computes with; what the scheduler's half has read must be the same.

Such a hook stays as long as its process, and changes nothing in it. It costs 0.6 us for each of Python's events
(measured on two busy cores). Only engines that serve adapters have it.
"""

import logging
import os
import sys
from functools import cache
from types import FrameType
from typing import Any

from kvstore_client.engines.adapter import CONFIG, AdapterFiles
from kvstore_client.engines.vllm.metadata import AdapterUse
from kvstore_client.miss_reason import MissReason

log = logging.getLogger(__name__)

_READER = "vllm.lora.peft_helper"
"""vLLM's module that opens the configuration, called by a function with the LoRARequest as its `lora_request`."""
_MOST_KEYS = 32_768
"""Adapters and folders beyond this many are not followed, and count as not loaded."""
_NOT_LOADED = "not loaded"


class LoadedAdapters:
    """Used by the worker's thread."""

    def __init__(self) -> None:
        self._files: dict[int | str, AdapterFiles | None] = {}
        """By vLLM's number of the adapter, and by folder. None where there was more than one kind: the adapter was
        replaced, and the engine has its earlier KV in its blocks, or has failed to load it."""
        self._unconfirmed: set[int] = set()
        """Adapters that were loaded since somebody asked for them."""
        self._is_blind = False
        """Whether a load was seen of which it is not known what was loaded."""

    def why_not(self, use: AdapterUse, *, storing: bool) -> MissReason | None:
        """Why KV under the name of this adapter must not be saved (`storing`) or loaded now; None when it may be."""
        if use.lora_id in self._unconfirmed:
            self._confirm(use.lora_id)
        found = [self._files.get(key, _NOT_LOADED) for key in (use.lora_id, use.files.folder)]
        if self._is_blind or not {use.files, _NOT_LOADED}.issuperset(found):
            return MissReason.STORE_ADAPTER_CHANGED if storing else MissReason.ADAPTER_CHANGED
        if _NOT_LOADED in found:
            return MissReason.STORE_ADAPTER_PENDING if storing else MissReason.ADAPTER_PENDING
        return None

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook. Never fails: that would keep the file from being opened."""
        if event != "open" or not (isinstance(arguments[0], str) and arguments[0].endswith(CONFIG)):
            return
        reader = sys._getframe(1)
        if reader.f_globals.get("__name__") != _READER:
            return
        try:
            self._loads(reader.f_back, os.path.dirname(arguments[0]))  # noqa: PTH120  # vLLM's folder, as it is written
        except Exception:
            self._is_blind = True
            log.exception(
                "it is not known which LoRA adapter vLLM loads; KV with adapters is not shared any more"
            )

    def _confirm(self, lora_id: int) -> None:
        """Look again when vLLM has loaded an adapter: its files may have been replaced while they were read."""
        self._unconfirmed.discard(lora_id)
        files = self._files.get(lora_id)
        if files is not None and _look(files.folder) != files:
            self._files[lora_id] = None

    def _loads(self, caller: FrameType | None, folder: str) -> None:
        lora_id: int = caller.f_locals["lora_request"].lora_int_id  # type: ignore[union-attr]  # None is caught
        files = _look(folder)
        self._unconfirmed.add(lora_id)
        for key in (lora_id, folder):
            if key in self._files:
                self._files[key] = files if files == self._files[key] else None
            elif len(self._files) < _MOST_KEYS:
                self._files[key] = files


def _look(folder: str) -> AdapterFiles | None:
    """None where a file is missing, as with weights in another format."""
    try:
        return AdapterFiles.of(folder)
    except (OSError, ValueError):
        return None


@cache
def loaded_adapters() -> LoadedAdapters:
    """Those of this process, followed from the first call on, which must come before vLLM loads any."""
    found = LoadedAdapters()
    sys.addaudithook(found.watch)
    return found
