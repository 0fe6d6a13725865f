"""A transformers `Cache` whose first tokens arrive while the model already computes."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore_client.buffers import KVBuffers
from kvstore_client.fetch import Fetch
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError


class FetchIncompleteError(FetchError):
    """Raised out of a forward pass whose reused KV will not all arrive; the adapter catches it and starts over."""


class ArrivingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer of reused KV. The first `update` waits for it; afterwards it is an ordinary dynamic layer."""

    def __init__(self, layer: int, buffers: KVBuffers, tokens: int, fetch: Fetch, timeline: Timeline) -> None:
        super().__init__()
        self._layer, self._fetch, self._timeline = layer, fetch, timeline
        self._arrived = False
        # Views: their length is known before their content is.
        self.keys = buffers.keys[layer, :, :tokens].unsqueeze(0)
        self.values = buffers.values[layer, :, :tokens].unsqueeze(0)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._arrived:
            self.arrive(key_states.device)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def arrive(self, device: torch.device) -> None:
        """Wait until the layer is there. Raises FetchIncompleteError if it will not be."""
        with self._timeline.span("wait", f"layer {self._layer}"):
            arrived = self._fetch.wait_layer(self._layer)
        if not arrived:
            raise FetchIncompleteError(f"layer {self._layer} will not arrive whole")
        self._arrived = True
        if device != self.device:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.device = device


def arriving_cache(buffers: KVBuffers, tokens: int, fetch: Fetch, timeline: Timeline) -> DynamicCache:
    """A cache that holds the first `tokens` tokens as soon as `fetch` has delivered them."""
    cache = DynamicCache()
    cache.layers = [
        ArrivingLayer(layer, buffers, tokens, fetch, timeline) for layer in range(buffers.keys.shape[0])
    ]
    return cache


def filled_cache(buffers: KVBuffers, tokens: int, device: torch.device) -> DynamicCache:
    """A cache with a copy of the first `tokens` tokens, which have been delivered."""
    cache = DynamicCache()
    if tokens:
        for layer in range(buffers.keys.shape[0]):
            keys, values = (
                b[layer, :, :tokens].unsqueeze(0).to(device) for b in (buffers.keys, buffers.values)
            )
            cache.update(keys, values, layer)
    return cache
