"""An engine of two layers in plain torch: all that a ReuseSession needs of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from kvstore_client.buffers import KVBuffers
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.call import ComputedKV, EngineOutput, LayerArrives
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.reuse.engine import Projected
from kvstore_client.reuse.identity import Refusal
from kvstore_client.reuse.rotation import rotated
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from kvstore_codec.rope import RotaryTable

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 101, 32, 4, 2, 8, 2
SPEC = ModelSpec(
    "two-layers",
    bytes(32),
    LAYERS,
    KV_HEADS,
    HEAD_DIM,
    KVDtype.FLOAT32,
    RopeSpec("default", 10000.0, HEAD_DIM),
)
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Described:
    spec: ModelSpec
    refusal: Refusal | None = None

    def still_holds(self) -> bool:
        return True

    def rows_hold(self) -> bool:
        return True


class Decoder:
    """Its weights are named by `seed`. Implements `DecoderLayers`."""

    layers = LAYERS
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int = 0) -> None:
        self.load(seed)

    def load(self, seed: int) -> None:
        """Other weights."""
        generator = torch.Generator().manual_seed(seed)
        self._described = Described(replace(SPEC, weights_digest=bytes([seed]) * 32))

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) / columns**0.5

        self._embeddings = weight(VOCABULARY, HIDDEN) * HIDDEN**0.5
        names = {
            "q": (HEADS * HEAD_DIM, HIDDEN),
            "k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "o": (HIDDEN, HEADS * HEAD_DIM),
            "up": (2 * HIDDEN, HIDDEN),
            "down": (HIDDEN, 2 * HIDDEN),
        }
        self._weights = [{name: weight(*shape) for name, shape in names.items()} for _ in range(LAYERS)]

    # ---- DecoderLayers

    def scale(self, layer: int) -> float:
        return HEAD_DIM**-0.5

    def window(self, layer: int) -> int | None:
        return None

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._embeddings[tokens][None]

    def project(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> Projected:
        weights, normed = self._weights[layer], rms_norm(hidden[0], (HIDDEN,))
        queries, keys, values = (
            (normed @ weights[name].T).view(len(normed), -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
        )
        return Projected(rotated(queries, rotary), rotated(keys, rotary), values, keys)

    def queries(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        return self.project(layer, hidden, rotary).queries

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        weights = self._weights[layer]
        hidden = hidden + attended.transpose(0, 1).reshape(1, -1, HEADS * HEAD_DIM) @ weights["o"].T
        return hidden + gelu(rms_norm(hidden, (HIDDEN,)) @ weights["up"].T) @ weights["down"].T

    # ---- a plain forward pass

    def rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        angles = torch.arange(tokens)[:, None] / 10000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        turned = torch.cat((angles, angles), dim=-1)
        return (RotaryTable(turned.cos(), turned.sin()),) * LAYERS

    def forward(self, tokens: torch.Tensor, cache: "Cache") -> torch.Tensor:
        """What leaves the last layer for `tokens`, behind those in the cache."""
        first, hidden = cache.tokens, self.embed(tokens)
        table = self.rotary(first + len(tokens))[0].at(slice(first, None))
        for layer in range(LAYERS):
            made = self.project(layer, hidden, table)
            cache.capture.projected(layer, made.unrotated_keys.transpose(0, 1)[None])
            keys, values = cache.put(layer, made.keys, made.values)
            mask = torch.ones(len(tokens), keys.shape[1], dtype=torch.bool).tril(first - cache.left_out)
            attended = scaled_dot_product_attention(
                made.queries[None], keys[None], values[None], mask, enable_gqa=True
            )[0]
            hidden = self.finish(layer, hidden, attended)
        cache.tokens += len(tokens)
        return hidden

    def next_token(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden[0, -1:] @ self._embeddings.T).argmax(-1)


class Cache:
    """Keys and values of a prompt, those that are reused first; a layer `arrives` before it is read."""

    def __init__(
        self,
        capture: KeyCapture,
        reused: KVBuffers | None = None,
        arrives: LayerArrives | None = None,
        left_out: int = 0,
        computed: int = 0,
    ) -> None:
        """`computed` tokens behind the reused ones are in the buffers, too."""
        self.capture, self.left_out = capture, left_out
        self.tokens = capture.first_token + computed
        self._reused, self._arrives = reused, arrives
        self.keys: Tensors = []
        self.values: Tensors = []

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, these behind those that were there."""
        if layer == len(self.keys):
            first = self.tokens - self.left_out
            if self._arrives is not None:
                self._arrives(layer)
            empty = keys[:, :0]
            self.keys.append(empty if self._reused is None else self._reused.keys[layer, :, :first])
            self.values.append(empty if self._reused is None else self._reused.values[layer, :, :first])
        self.capture.cached(layer, keys.shape[1])
        begin, end = self.keys[layer].shape[1], self.keys[layer].shape[1] + keys.shape[1]
        if self._reused is not None and end <= self._reused.keys.shape[2]:
            self._reused.keys[layer, :, begin:end] = keys
            self._reused.values[layer, :, begin:end] = values
        self.keys[layer] = torch.cat((self.keys[layer], keys), dim=1)
        self.values[layer] = torch.cat((self.values[layer], values), dim=1)
        return self.keys[layer], self.values[layer]


class Engine:
    """A Decoder behind the `Engine` protocol."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.computed_tokens = 0
        """In chunks that were computed into buffers."""

    def embed(self, tokens: torch.Tensor, /) -> torch.Tensor:
        return self.decoder.embed(tokens)[0]

    def look(self, tokens: torch.Tensor | None = None) -> Described:
        return self.decoder._described

    def renew_hooks(self) -> None: ...

    def rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        return self.decoder.rotary(tokens)

    def compute(self, tokens: torch.Tensor, buffers: KVBuffers, capture: KeyCapture) -> None:
        self.decoder.forward(tokens, Cache(capture, buffers))
        self.computed_tokens += len(tokens)


@dataclass
class Call:
    """Answers a prompt greedily; `see` is shown each new token, and may raise."""

    decoder: Decoder
    tokens: torch.Tensor
    segments: Sequence[int] | None = None
    recompute: Recompute | None = None
    budget: float | None = None
    see: Callable[[int], None] = lambda _: None
    bypassed: str | None = None
    new_tokens: int = 4
    passes: int = field(default=0, init=False)

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens)

    def bypass_reason(self) -> str | None:
        return self.bypassed

    def pass_through(self) -> Any:
        return _Pass(self, Cache(KeyCapture(LAYERS, 0))).run().output

    def prompt_pass(
        self,
        capture: KeyCapture,
        reused: KVBuffers | None = None,
        arrives: LayerArrives | None = None,
        left_out: int = 0,
        state: torch.Tensor | None = None,
    ) -> "_Pass":
        self.passes += 1
        computed = int(state is not None)
        return _Pass(self, Cache(capture, reused, arrives, left_out, computed), state)


class _Pass:
    def __init__(self, call: Call, cache: Cache, state: torch.Tensor | None = None) -> None:
        self._call, self._cache, self._state = call, cache, state

    def run(self) -> EngineOutput:
        call, sequence, states = self._call, self._call.tokens, self._state
        if states is None:
            states = call.decoder.forward(sequence[self._cache.tokens :], self._cache)
        for number in range(call.new_tokens):
            token = call.decoder.next_token(states)
            sequence = torch.cat((sequence, token))
            call.see(int(token))
            if number < call.new_tokens - 1:
                states = call.decoder.forward(token, self._cache)
        return EngineOutput(sequence[len(call.tokens) :].tolist(), sequence)

    def take(self, *, values: bool) -> ComputedKV:
        first = self._cache.capture.first_token
        return ComputedKV(
            self._cache.tokens, tuple(v[:, first:] for v in self._cache.values) if values else ()
        )

    def salvage(self) -> ComputedKV | None:
        return self.take(values=True) if self._cache.tokens > self._cache.capture.first_token else None


class Agreeing:
    """A canary that every model agrees with, or that refuses for a reason."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.watched: list[ModelSpec] = []
        self.counted: list[str] = []

    def watch(self, spec: ModelSpec) -> None:
        self.watched.append(spec)

    def refusal(self, spec: ModelSpec, *, wait_s: float) -> str | None:
        return self.reason

    def why(self, reason: str) -> str:
        return f"{reason}: as the test says"

    def count_refusal(self, reason: str, *, storing: bool = False) -> str:
        self.counted.append(f"store_{reason}" if storing else reason)
        return self.why(reason)
