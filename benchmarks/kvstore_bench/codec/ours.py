"""An encoding of this project's codec as a measured method."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from kvstore_bench.codec.fidelity import Passage
from kvstore_bench.codec.method import Coded, Stopwatch, one_thread
from kvstore_codec.calibration import token_features
from kvstore_codec.codec import EncodedChunk, decode_frames, encode_chunk
from kvstore_codec.coders import decoder
from kvstore_codec.coders.hevc.base import HevcCoder
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.klt_frames import KLT


class Ours:
    def __init__(self, encoding: Encoding, klt: KLT | None) -> None:
        self._encoding = encoding
        self._klt = klt if encoding.needs_calibration else None

    @property
    def name(self) -> str:
        return self._encoding.name

    @property
    def labels(self) -> Mapping[str, str | int]:
        return {
            "method": "kvstore",
            "layout": self._encoding.layout,
            "coder": self._encoding.coder,
            "rate": str(self._encoding.rate),
            "frame_tokens": self._encoding.frame_tokens,
        }

    def code(self, passages: Sequence[Passage]) -> Iterator[Coded]:
        for passage in passages:
            with one_thread():
                coded = self._code(passage)
            yield coded

    def _code(self, passage: Passage) -> Coded:
        keys, values = torch.empty_like(passage.keys), torch.empty_like(passage.values)
        ids = passage.chunk_ids()
        stored = 0
        sizes: list[int] = []
        encode_s: list[float] = []
        decode_s: list[float] = []
        restore_s: list[float] = []
        guarded: dict[str, int] = {}
        with ExitStack() as stack:
            coding = Stopwatch()
            if self._encoding.rate is not Rate.EXACT:  # exact values are decoded in place
                chosen = decoder(self._encoding.coder)
                methods = ("decode", "decode_pictures") if isinstance(chosen, HevcCoder) else ("decode",)
                stack.enter_context(coding.watching(chosen, *methods))
            for index, chunk_id in enumerate(ids):
                cut = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
                begin = time.perf_counter()
                chunk = self._encode(passage, cut, chunk_id)
                encode_s.append(time.perf_counter() - begin)
                spans = _periods(chunk)
                coding.lap_s()
                begin = time.perf_counter()
                self._decode(passage, cut, chunk, spans, keys[:, :, cut], values[:, :, cut])
                whole_s, coder_s = time.perf_counter() - begin, coding.lap_s()
                decode_s.append(coder_s or whole_s)
                if coder_s:
                    restore_s.append(whole_s - coder_s)
                sizes.append(keys[:, :, cut].nbytes + values[:, :, cut].nbytes)
                stored += chunk.size_bytes
                for kind, frames in chunk.guarded.items():
                    guarded[kind] = guarded.get(kind, 0) + frames
        return Coded(keys, values, stored, sizes, encode_s, decode_s, restore_s, guarded=guarded)

    def _encode(self, passage: Passage, cut: slice, chunk_id: ChunkId) -> EncodedChunk:
        klt = self._klt
        return encode_chunk(
            passage.keys[:, :, cut],
            passage.values[:, :, cut],
            spec=passage.spec,
            chunk_id=chunk_id,
            encoding=self._encoding,
            klt=klt,
            features=token_features(passage.embeddings[cut]) if klt else None,
            sinks=klt.calibration.sinks if klt and cut.start == 0 else 0,
        )

    def _decode(
        self,
        passage: Passage,
        cut: slice,
        chunk: EncodedChunk,
        spans: Sequence[bytes],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Decodes a whole chunk as a worker does, period by period."""
        klt, geometry = self._klt, chunk.header.geometry
        prediction = klt.predict(token_features(passage.embeddings[cut])) if klt else None
        frames = geometry.frames_per_period
        for period, data in enumerate(spans):
            layers = geometry.layers_of(period)
            place = np.s_[layers.start : layers.stop]
            decode_frames(
                chunk.header,
                period * frames,
                frames,
                data,
                keys[place],
                values[place],
                klt=klt,
                prediction=prediction,
            )


def _periods(chunk: EncodedChunk) -> list[bytes]:
    """The bytes of each period's frames, contiguous as they are stored."""
    frames = chunk.header.geometry.frames_per_period
    return [b"".join(chunk.parts[first : first + frames]) for first in range(1, len(chunk.parts), frames)]
