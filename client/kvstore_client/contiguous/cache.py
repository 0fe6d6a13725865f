"""Attention-guided cache of decoded frames, shared by all requests of a process (ContiguousKV, arXiv 2601.13631)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

from kvstore_client.contiguous.attention_scores import AttentionScores
from kvstore_client.contiguous.cache_level import CacheLevel
from kvstore_client.contiguous.grid import FrameKey
from kvstore_codec.errors import StorageError


class FrameCache:
    """Frames on the model's device, and behind them frames in host memory. Thread-safe.

    A frame's value is its accumulated attention x its number of loads, as published. A level that is full loses the
    frame of the lowest priority: from the device it moves to the host (demotion), from the host it is dropped, because
    the storage nodes have it. Priority is value + age, where the age of the host level is the priority of the last
    frame that it dropped: without it, frames of a text that nobody asks about any more would never leave.

    Returned tensors are shared and must not be written to. They stay valid when the cache drops them.
    """

    def __init__(self, host_bytes: int, device_bytes: int = 0) -> None:
        """`device_bytes` is the limit of frames on a device other than the processor, `host_bytes` that in host
        memory."""
        self._lock = threading.Lock()
        self._device, self._host = CacheLevel(device_bytes), CacheLevel(host_bytes)
        self._scores = AttentionScores()
        self._age = 0.0

    @property
    def size_bytes(self) -> int:
        """Size of all cached frames, bytes."""
        with self._lock:
            return self._device.size_bytes + self._host.size_bytes

    def get(self, keys: Iterable[FrameKey]) -> dict[FrameKey, torch.Tensor]:
        """Those of the frames that are cached. Does not count as a use."""
        found: dict[FrameKey, torch.Tensor] = {}
        with self._lock:
            for key in keys:
                frame = self._device.get(key)
                if frame is None:
                    frame = self._host.get(key)
                if frame is not None:
                    found[key] = frame
        return found

    def used(self, frames: Mapping[FrameKey, torch.Tensor], attention: Mapping[FrameKey, float]) -> None:
        """Count a use of each frame by a question that paid it this share of its attention, and keep the frames, each
        in the level of its device. Copies frames that are demoted, outside the lock."""
        demoted: list[tuple[FrameKey, torch.Tensor]] = []
        with self._lock:
            for key, frame in frames.items():
                priority = self._age + self._scores.used(key, attention.get(key, 0.0))
                if frame.is_cpu:
                    self._keep_on_host(key, frame, priority)
                    continue
                self._host.pop(key)
                for victim, kept, _ in self._device.put(key, frame, priority):
                    demoted.append((victim, kept))
        copies = [(key, frame.to("cpu")) for key, frame in demoted]
        with self._lock:
            for key, frame in copies:
                if key not in self._device:
                    self._keep_on_host(key, frame, self._age + self._scores.of(key))

    def clear(self) -> None:
        """Drop all frames and what is known about them."""
        with self._lock:
            self._device, self._host = (CacheLevel(level.limit_bytes) for level in (self._device, self._host))
            self._scores, self._age = AttentionScores(), 0.0

    def check_integrity(self) -> None:
        """Raises StorageError when the levels contradict themselves or each other."""
        with self._lock:
            self._device.check_integrity()
            self._host.check_integrity()
            twice = [key for key in self._device if key in self._host]
        if twice:
            raise StorageError(f"{len(twice)} frames are in both levels of the cache")

    def _keep_on_host(self, key: FrameKey, frame: torch.Tensor, priority: float) -> None:
        if key in self._host:
            self._host.reprioritise(key, priority)
            return
        for _, _, lowest in self._host.put(key, frame, priority):
            self._age = max(self._age, lowest)
