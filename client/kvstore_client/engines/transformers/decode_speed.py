"""Measures how long stored KV takes to decode and restore, with the code that a fetch uses."""

import threading
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.engines.transformers.capture import attention_modules, watch_heads
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.prefill_speed import PrefillSpeed
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.planning.profile import CodecCost
from kvstore_client.threads import single_threaded
from kvstore_codec.calibration import token_features
from kvstore_codec.codec import EncodedChunk, decode_frames, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import CHUNK_TOKENS, chunk_ids
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import rotate_layers_

_ROUNDS = 3
_ENOUGH_S = 0.3
"""Decoding time after which no further round is measured, seconds."""


class SampleChunk:
    """A chunk of real KV: the second chunk of a sample text, computed by `model`. Use it in inference mode."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, speed: PrefillSpeed) -> None:
        seen: dict[int, torch.Tensor] = {}

        def note(layer: int) -> Callable[[torch.Tensor], None]:
            return lambda heads: seen.__setitem__(layer, heads[0].transpose(0, 1))

        self._spec = spec
        self.tokens = min(CHUNK_TOKENS, speed.long_tokens // 2)
        place = slice(self.tokens, 2 * self.tokens)
        hooks = [
            watch_heads(attention, "k", note(layer))
            for layer, attention in enumerate(attention_modules(model))
        ]
        try:
            cache = DynamicCache()
            speed.timed(cache, place.stop)
        finally:
            for hook in hooks:
                hook.remove()
        self._keys = torch.stack([seen[layer][:, place].cpu() for layer in range(spec.layers)])
        self._values = torch.stack([layer.values[0, :, place].cpu() for layer in cache.layers])
        self.shape = tuple(self._keys.shape)
        ids = speed.text[place].cpu()
        self._id = chunk_ids(spec.digest, b"", ids, self.tokens)[0]
        self.features = token_features(embedded(model, ids))
        self.place = place
        self.rotary = rotary_tables(model, place.stop, spec.dtype.torch, "cpu")

    def encode(self, encoding: Encoding, klt: KLT | None) -> "EncodedSample":
        """Encode the sample. Raises CodecError for an encoding that this machine or `klt` does not support."""
        chunk = encode_chunk(
            self._keys,
            self._values,
            spec=self._spec,
            chunk_id=self._id,
            encoding=encoding,
            klt=klt,
            features=self.features,
        )
        return EncodedSample(self, chunk, klt)


class EncodedSample:
    """The sample in one encoding. It is decoded period by period into memory that was written before. Use it from one
    thread at a time, in inference mode."""

    def __init__(self, sample: SampleChunk, chunk: EncodedChunk, klt: KLT | None) -> None:
        self._sample, self._header, self._klt = sample, chunk.header, klt
        geometry = chunk.header.geometry
        self._frames = geometry.frames_per_period
        self._periods = [
            b"".join(chunk.parts[1 + period * self._frames : 1 + (period + 1) * self._frames])
            for period in range(geometry.periods)
        ]
        self._out = torch.zeros(2, *sample.shape, dtype=geometry.dtype.torch, device="cpu")
        self._prediction = None if klt is None else klt.predict(sample.features)

    @property
    def size_bytes(self) -> int:
        return self._header.size_bytes

    @property
    def periods(self) -> int:
        return len(self._periods)

    def decode(self, period: int) -> float:
        """Decode a period; returns seconds. Neighbouring frames are decoded together, as in a fetch."""
        layers = self._header.geometry.layers_of(period)
        keys, values = self._out[:, layers.start : layers.stop]
        begin_s = time.perf_counter()
        decode_frames(
            self._header,
            period * self._frames,
            self._frames,
            self._periods[period],
            keys,
            values,
            klt=self._klt,
            prediction=self._prediction,
        )
        return time.perf_counter() - begin_s

    def restore(self, period: int) -> float:
        """Rotate the keys of a decoded period; returns seconds."""
        begin_s = time.perf_counter()
        of = self._header.geometry.layers_of(period)
        layers = slice(of.start, of.stop)
        rotate_layers_(self._out[0, layers], self._sample.rotary[layers], self._sample.place)
        return time.perf_counter() - begin_s

    @single_threaded()
    def measure(self) -> CodecCost:
        """Costs per token, from the fastest of a few rounds."""
        rounds: list[tuple[float, float]] = []
        begin_s = time.perf_counter()
        while len(rounds) < _ROUNDS and (not rounds or time.perf_counter() - begin_s < _ENOUGH_S):
            spent = [(self.decode(period), self.restore(period)) for period in range(self.periods)]
            rounds.append((sum(decode for decode, _ in spent), sum(restore for _, restore in spent)))
        decode_s, restore_s = map(min, zip(*rounds, strict=True))
        return CodecCost(decode_s / self._sample.tokens, restore_s / self._sample.tokens)


def measure_interference(sample: EncodedSample, cost_s: float, computing: Callable[[], float]) -> float:
    """How much decoding and `computing` slow each other (see `Profile.interference`). Decoding the whole sample alone
    takes `cost_s`; each call of `computing` returns its seconds."""
    alone_s = min(computing() for _ in range(2))
    stop = threading.Event()
    decoded: list[int] = []

    @single_threaded()
    @torch.inference_mode()
    def decode() -> None:
        while not stop.is_set():
            period = len(decoded) % sample.periods
            sample.decode(period)
            sample.restore(period)
            decoded.append(period)

    thread = threading.Thread(target=decode, name="kvstore-profile", daemon=True)
    thread.start()
    try:
        before = len(decoded)
        both_s = computing()
        work_s = (len(decoded) - before) / sample.periods * cost_s
    finally:
        stop.set()
        thread.join()
    less = min(alone_s, work_s)
    return min(max((both_s - max(alone_s, work_s)) / less, 0.0), 1.0) if less > 0 else 0.0
