"""The textbook way to quantise KV, as a baseline: the range of each channel is divided into equal levels.

It needs no calibration. For each chunk and channel (K or V, layer, head, dimension) it stores the minimum and the
maximum as f16, and quantises values to integers of 4, 6 or 8 bits between them. The integers are encoded losslessly:
as pictures of the layout `token_frames`, or with zstd in memory order.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore_bench.codec.fidelity import Passage
from kvstore_bench.codec.method import Coded, one_thread
from kvstore_codec.coders import Plane, coder
from kvstore_codec.coders.hevc.base import HevcCoder
from kvstore_codec.errors import UnknownEncodingError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.layouts.token_frames import Samples, decode_token_frames, encode_token_frames

_CODERS = ("hevc-cpu", "zstd")


@dataclass(frozen=True, slots=True)
class Levels:
    """K and V of one chunk, quantised to integers of `bits` bits."""

    integers: Plane
    """[2 * layers, kv_heads, tokens, head_dim], K of all layers and then V"""
    ranges: npt.NDArray[np.float16]
    """minimum and maximum, [2, 2 * layers, kv_heads, 1, head_dim]"""
    bits: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, bits: int) -> "Levels":
        """Quantises keys and values, [layers, kv_heads, tokens, head_dim] each."""
        both = torch.cat((keys, values)).float()
        found = torch.stack((both.amin(2, keepdim=True), both.amax(2, keepdim=True)))
        ranges: npt.NDArray[np.float16] = found.half().numpy()
        least, step = _grid(ranges, bits)
        integers = both.sub_(least).div_(step).round_().clamp_(0, (1 << bits) - 1)
        return cls(integers.to(torch.uint8).numpy(), ranges, bits)

    def restore(self, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        least, step = _grid(self.ranges, self.bits)
        both = torch.from_numpy(self.integers).float().mul_(step).add_(least)
        for out, restored in zip((out_keys, out_values), both.chunk(2), strict=True):
            out.copy_(restored)


class MinMax:
    """The methods `minmax8-zstd`, `minmax4-hevc-cpu` and so on. Raises UnknownEncodingError for an unknown coder."""

    def __init__(self, bits: int, coder_name: str) -> None:
        if coder_name not in _CODERS or not 1 <= bits <= 8:
            raise UnknownEncodingError(
                f"min/max supports 1 to 8 bits with {' or '.join(_CODERS)}, not {bits} bits with {coder_name}"
            )
        self._bits = bits
        self._coder = coder_name

    @property
    def name(self) -> str:
        return f"minmax{self._bits}-{self._coder}"

    @property
    def labels(self) -> Mapping[str, str | int]:
        return {
            "method": "min/max",
            "layout": "token_frames" if self._coder == "hevc-cpu" else "planes",
            "coder": self._coder,
            "rate": f"{self._bits} bit",
            "frame_tokens": CHUNK_TOKENS,
        }

    def code(self, passages: Sequence[Passage]) -> Iterator[Coded]:
        for passage in passages:
            with one_thread():
                coded = self._code(passage)
            yield coded

    def _code(self, passage: Passage) -> Coded:
        keys, values = torch.empty_like(passage.keys), torch.empty_like(passage.values)
        stored = 0
        sizes: list[int] = []
        encode_s: list[float] = []
        decode_s: list[float] = []
        restore_s: list[float] = []
        for first in range(0, keys.shape[2], CHUNK_TOKENS):
            cut = np.s_[:, :, first : first + CHUNK_TOKENS]
            begin = time.perf_counter()
            levels = Levels.of(passage.keys[cut], passage.values[cut], self._bits)
            data = self._encode(levels.integers)
            encoded = time.perf_counter()
            received = np.empty_like(levels.integers)
            self._decode(data, received)
            decoded = time.perf_counter()
            Levels(received, levels.ranges, self._bits).restore(keys[cut], values[cut])
            restore_s.append(time.perf_counter() - decoded)
            decode_s.append(decoded - encoded)
            encode_s.append(encoded - begin)
            sizes.append(passage.keys[cut].nbytes + passage.values[cut].nbytes)
            stored += len(data) + levels.ranges.nbytes
        return Coded(keys, values, stored, sizes, encode_s, decode_s, restore_s)

    def _encode(self, integers: Samples) -> bytes:
        chosen = coder(self._coder)
        if isinstance(chosen, HevcCoder):
            return encode_token_frames(integers, chosen)
        return chosen.encode(integers.reshape(-1, integers.shape[-1]))

    def _decode(self, data: bytes, out: Samples) -> None:
        chosen = coder(self._coder)
        if isinstance(chosen, HevcCoder):
            decode_token_frames(memoryview(data), chosen, out)
        else:
            chosen.decode(data, out.reshape(-1, out.shape[-1]))


def _grid(ranges: npt.NDArray[np.float16], bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum of each channel and the distance between its levels, as a decoder reads them."""
    least, largest = torch.from_numpy(ranges).float()
    step = (largest - least) / ((1 << bits) - 1)
    return least, step.where(step > 0, torch.ones(()))
