"""A transformers `Cache` whose first tokens arrive while the model already computes."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore_client.buffers import KVBuffers
from kvstore_client.engines.transformers.capture import KeyCapture
from kvstore_client.fetch import Fetch
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError


class FetchIncompleteError(FetchError):
    """Raised out of a forward pass whose reused KV will not all arrive; the adapter catches it and starts over."""


class CapturedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A dynamic layer that tells a KeyCapture what it took."""

    def __init__(self, layer: int, capture: KeyCapture) -> None:
        super().__init__()
        self._layer, self._capture = layer, capture

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._capture.cached(self._layer, key_states.shape[-2])
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


class ArrivingLayer(CapturedLayer):
    """One layer of reused KV. The first `update` waits for it; afterwards it is an ordinary layer."""

    def __init__(
        self,
        layer: int,
        capture: KeyCapture,
        buffers: KVBuffers,
        tokens: int,
        fetch: Fetch,
        timeline: Timeline,
    ) -> None:
        super().__init__(layer, capture)
        self._fetch, self._timeline = fetch, timeline
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
            self._arrive(key_states.device)
        return super().update(key_states, value_states, *args, **kwargs)

    def _arrive(self, device: torch.device) -> None:
        with self._timeline.span("wait", f"layer {self._layer}"):
            arrived = self._fetch.wait_layer(self._layer)
        if not arrived:
            raise FetchIncompleteError(f"layer {self._layer} will not arrive whole")
        self._arrived = True
        if device != self.device:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.device = device


class PlacedLayer(CapturedLayer):
    """One layer behind reused KV that lies in buffers: what the model computes is put into its place there."""

    def __init__(self, layer: int, capture: KeyCapture, buffers: KVBuffers) -> None:
        super().__init__(layer, capture)
        self._layer_keys, self._layer_values = (b[layer].unsqueeze(0) for b in (buffers.keys, buffers.values))
        self._show(capture.first_token)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._capture.cached(self._layer, key_states.shape[-2])
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        self._layer_keys[:, :, begin:end].copy_(key_states)
        self._layer_values[:, :, begin:end].copy_(value_states)
        self._show(end)
        return self.keys.to(key_states.device), self.values.to(value_states.device)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self._layer_keys[:, :, :tokens], self._layer_values[:, :, :tokens]


def empty_cache(capture: KeyCapture, layers: int) -> DynamicCache:
    """A cache for a prompt of which nothing is reused."""
    return _cache([CapturedLayer(layer, capture) for layer in range(layers)])


def arriving_cache(buffers: KVBuffers, capture: KeyCapture, fetch: Fetch, timeline: Timeline) -> DynamicCache:
    """A cache that holds the tokens before the captured ones as soon as `fetch` has delivered them."""
    tokens = capture.first_token
    return _cache(
        [
            ArrivingLayer(layer, capture, buffers, tokens, fetch, timeline)
            for layer in range(buffers.keys.shape[0])
        ]
    )


def placed_cache(buffers: KVBuffers, capture: KeyCapture) -> DynamicCache:
    """A cache whose tokens before the captured ones are in the buffers, and that puts the captured ones there."""
    return _cache([PlacedLayer(layer, capture, buffers) for layer in range(buffers.keys.shape[0])])


def make_plain(cache: DynamicCache) -> None:
    """Give a finished cache ordinary layers: it may be copied, pickled and kept, and holds on to nothing of ours."""
    for index, layer in enumerate(cache.layers):
        plain = DynamicLayer()
        if layer.is_initialized:
            plain.lazy_initialization(layer.keys, layer.values)
            plain.keys, plain.values = layer.keys, layer.values
        cache.layers[index] = plain


def _cache(layers: list[CapturedLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache
