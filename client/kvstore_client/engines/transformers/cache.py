"""A transformers `Cache` whose reused tokens arrive while the model already computes."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvstore_client.buffers import KVBuffers
from kvstore_client.reuse.call import LayerArrives
from kvstore_client.reuse.capture import KeyCapture


class PartialLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A dynamic layer without the KV of the first `left_out` tokens, or of so many others that its tokens do not attend
    to. Its tokens keep their positions: masks and positions are those of a sliding window that has moved past the
    tokens left out."""

    def __init__(self, left_out: int = 0) -> None:
        super().__init__()
        self.left_out = left_out

    def get_seq_length(self) -> int:
        return self.left_out + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length)
        return length - self.left_out, offset + self.left_out


class CapturedLayer(PartialLayer):
    """A dynamic layer that reports the tokens it caches to a KeyCapture."""

    def __init__(self, layer: int, capture: KeyCapture) -> None:
        super().__init__()
        self._layer, self._capture = layer, capture

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._capture.cached(self._layer, key_states.shape[-2])
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


class PlacedLayer(CapturedLayer):
    """A layer whose reused KV is in buffers. New KV is written behind it in the same buffers while there is room, so
    nothing is copied; after that it is an ordinary dynamic layer.

    A layer with a sliding window holds the reused tokens of the window and all new ones. Nothing further back is in its
    tensors: the buffers may be unwritten there, and even a masked value reaches the model if it is NaN.
    """

    def __init__(self, layer: int, capture: KeyCapture, buffers: KVBuffers, left_out: int = 0) -> None:
        """The buffers hold the tokens before the captured ones, but for `left_out` of them."""
        super().__init__(layer, capture)
        self.window = buffers.windows[layer] if buffers.windows else None
        # transformers makes one mask for all layers that slide, and one for all others.
        self.is_sliding = self.window is not None
        held = capture.first_token - left_out
        begin = 0 if self.window is None else max(0, held - self.window + 1)
        self.left_out = left_out + begin
        self._all_keys, self._all_values = (
            kv[layer, None, :, begin:] for kv in (buffers.keys, buffers.values)
        )
        self.is_in_buffers = True
        """Whether the tensors are views of buffers that will be released."""
        self._show(held - begin)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        if not self.is_in_buffers or end > self._all_keys.shape[-2]:
            self.is_in_buffers = False
            return super().update(key_states, value_states, *args, **kwargs)
        self._capture.cached(self._layer, key_states.shape[-2])
        self._all_keys[:, :, begin:end].copy_(key_states)
        self._all_values[:, :, begin:end].copy_(value_states)
        self._show(end)
        return self.keys.to(key_states.device), self.values.to(value_states.device)

    def advance(self, tokens: int) -> None:
        """Count in tokens whose KV is in the buffers, behind the others."""
        self._capture.cached(self._layer, tokens)
        self._show(self.keys.shape[-2] + tokens)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = self._all_keys[:, :, :tokens], self._all_values[:, :, :tokens]


class ArrivingLayer(PlacedLayer):
    """A layer of reused KV whose first `update` waits until the KV has arrived."""

    def __init__(
        self,
        layer: int,
        capture: KeyCapture,
        buffers: KVBuffers,
        arrives: LayerArrives,
    ) -> None:
        super().__init__(layer, capture, buffers)  # views: their length is known before their content
        self._arrives: LayerArrives | None = arrives

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._arrives is not None:
            self._arrives(self._layer)
            self._arrives = None
            self._move(key_states.device)
        return super().update(key_states, value_states, *args, **kwargs)

    def _move(self, device: torch.device) -> None:
        if device != self.device:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.device = device
            self.is_in_buffers = False


def empty_cache(capture: KeyCapture, layers: int) -> DynamicCache:
    """A cache for a prompt without reused KV."""
    return _cache([CapturedLayer(layer, capture) for layer in range(layers)])


def arriving_cache(buffers: KVBuffers, capture: KeyCapture, arrives: LayerArrives) -> DynamicCache:
    """A cache that holds the tokens before the captured ones. Each layer is complete once `arrives` returns for it."""
    layers = range(buffers.keys.shape[0])
    return _cache([ArrivingLayer(layer, capture, buffers, arrives) for layer in layers])


def placed_cache(buffers: KVBuffers, capture: KeyCapture) -> DynamicCache:
    """A cache whose reused tokens are in the buffers already, and that writes the captured tokens behind them."""
    return _cache([PlacedLayer(layer, capture, buffers) for layer in range(buffers.keys.shape[0])])


def partial_cache(buffers: KVBuffers, capture: KeyCapture, left_out: int) -> DynamicCache:
    """Like `placed_cache`, for buffers without the KV of `left_out` of the tokens before the captured ones."""
    layers = range(buffers.keys.shape[0])
    return _cache([PlacedLayer(layer, capture, buffers, left_out) for layer in layers])


def make_plain(cache: DynamicCache) -> None:
    """Give a finished cache ordinary layers, which can be copied, pickled and kept, and which refer to no shared
    buffers. Layers that hold reused KV of a sliding window keep the last window, as transformers does."""
    cache.layers = [_plain(layer) for layer in cache.layers]


def computed_values(cache: DynamicCache, first_token: int) -> tuple[torch.Tensor, ...]:
    """Values in a finished cache from position `first_token` on, by layer `[kv_heads, tokens, head_dim]`. They stay
    valid after the buffers are released. Empty for a cache that no pass has filled. Call it before `make_plain`."""
    if not all(layer.is_initialized for layer in cache.layers):
        return ()
    return tuple(_kept(layer, layer.values[0, :, first_token - layer.left_out :]) for layer in cache.layers)


def whole_tokens(cache: DynamicCache, capture: KeyCapture) -> int:
    """Position up to which every layer of a cache holds KV, when its last forward pass may have been interrupted.

    Returns the first captured token when the captured keys do not match the cached tokens.
    """
    ends = []
    for index, layer in enumerate(cache.layers):
        end = layer.get_seq_length()
        if not capture.has_step_to(index, end):
            return capture.first_token
        ends.append(end)
    return min(ends, default=capture.first_token)


def _plain(layer: CapturedLayer) -> DynamicLayer:
    plain, first = PartialLayer(layer.left_out) if layer.left_out else DynamicLayer(), 0
    if isinstance(layer, PlacedLayer) and layer.window is not None:
        plain = DynamicSlidingWindowLayer(layer.window)
        plain.cumulative_length = layer.get_seq_length()
        first = max(0, layer.keys.shape[-2] - layer.window + 1)
    if layer.is_initialized:
        plain.lazy_initialization(layer.keys, layer.values)
        plain.keys, plain.values = (_kept(layer, kv[:, :, first:]) for kv in (layer.keys, layer.values))
    return plain


def _kept(layer: DynamicLayer, tensor: torch.Tensor) -> torch.Tensor:
    lent = isinstance(layer, PlacedLayer) and layer.is_in_buffers
    return tensor.clone() if lent else tensor


def _cache(layers: list[CapturedLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache
