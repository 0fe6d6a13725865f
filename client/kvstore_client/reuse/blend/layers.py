"""Access to a prompt's reused KV on the model's device, layer by layer."""

from collections.abc import Callable

import torch

from kvstore_client.buffers import KVBuffers


class HostLayers:
    """The buffers themselves, for a model in host memory."""

    def __init__(self, buffers: KVBuffers, arrived: Callable[[int], None]) -> None:
        self.kv = buffers
        self._arrived = arrived

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `[kv_heads, tokens, head_dim]`, to read and write."""
        self._arrived(layer)
        return self.kv.keys[layer], self.kv.values[layer]


class DeviceLayers:
    """Copies on a CUDA device, made in a stream of their own. The host only enqueues kernels, so the copy of a layer
    runs during the computation of the one before it (CacheTune, section on pipelined transfer)."""

    def __init__(self, buffers: KVBuffers, arrived: Callable[[int], None], device: torch.device) -> None:
        keys, values = (torch.empty_like(t, device=device) for t in (buffers.keys, buffers.values))
        self.kv = KVBuffers(keys, values, keys)
        self._host, self._arrived = buffers, arrived
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copied: set[int] = set()

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Like HostLayers; kernels that use the result wait for the copy on the device."""
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        if layer not in self._copied:
            self._arrived(layer)
            with torch.cuda.stream(self._stream):
                keys.copy_(self._host.keys[layer], non_blocking=True)
                values.copy_(self._host.values[layer], non_blocking=True)
                self._host.copies.append(self._stream.record_event())
            torch.cuda.current_stream(keys.device).wait_stream(self._stream)
            self._copied.add(layer)
        return keys, values


def layers_on(
    device: torch.device, buffers: KVBuffers, arrived: Callable[[int], None]
) -> HostLayers | DeviceLayers:
    return DeviceLayers(buffers, arrived, device) if device.type == "cuda" else HostLayers(buffers, arrived)
