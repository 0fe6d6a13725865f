"""Encodes the KV of a chunk to frames, and decodes frames to KV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.decoding import FramesTogether, require_klt, require_kv
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import InvalidKVError
from kvstore_codec.geometry import PERIOD_LAYERS, Geometry, period_layers_of
from kvstore_codec.identity import ChunkId
from kvstore_codec.klt_frames import KLT, Prediction, encode_klt_frame
from kvstore_codec.layouts.token_frames import LAYERS_PER_PICTURE
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.payload import PayloadKind, PayloadWriter
from kvstore_codec.quantise import STEP_PER_RMS, encode_quantised
from kvstore_codec.signing_keys import SigningKeys
from kvstore_codec.token_order import TokenOrder
from kvstore_codec.words import encode_words, words_of

# A lossy frame above this fraction of its KV's bytes is compared with an exact frame, which may be smaller.
_SUSPICIOUS = 0.5


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """An encoded chunk. `parts` holds the header's bytes and then each frame, in order, not joined."""

    header: ChunkHeader
    parts: list[bytes]
    guarded: Mapping[str, int]
    """Numbers of frames unlike the calibration's text: coded with a "finer" step, and coded "exact"."""

    @property
    def size_bytes(self) -> int:
        return self.header.size_bytes


def encode_chunk(
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    spec: ModelSpec,
    chunk_id: ChunkId,
    encoding: Encoding,
    klt: KLT | None = None,
    features: torch.Tensor | None = None,
    sinks: int = 0,
    token_order: TokenOrder | None = None,
    keys_to_sign: SigningKeys | None = None,
) -> EncodedChunk:
    """Encodes `keys` (before RoPE) and `values`, both [layers, kv_heads, tokens, head_dim] with any strides,
    on any device, of the dtype of `spec`.

    An encoding with the transform "klt" needs the model's calibration as a KLT and the chunk's `token_features`
    [tokens, features]. Its first `sinks` tokens are kept exact (`Calibration.sinks` if the chunk begins a text).
    `token_order` is stored in the chunk's header. The chunk is signed if `keys_to_sign` are given.

    Scratch memory, besides the result: about 4 bytes per value of one frame for `exact`, 24 for the lossy rates.
    Raises InvalidKVError for tensors that do not fit `spec`, CalibrationError for a calibration that is missing or of
    another model, CoderUnavailableError for a coder that cannot run on this machine.
    """
    if keys.ndim != 4 or not keys.numel():
        raise InvalidKVError(f"keys of shape {list(keys.shape)} are not [layers, kv_heads, tokens, head_dim]")
    tokens = keys.shape[2]
    require_kv("keys", keys, (spec.layers, spec.kv_heads, tokens, spec.head_dim), spec.dtype)
    require_kv("values", values, tuple(keys.shape), spec.dtype)
    if encoding.needs_calibration:
        frames, guarded, geometry = _encode_klt(keys, values, spec, encoding, klt, features, sinks)
    else:
        klt, guarded = None, {}
        geometry = chunk_geometry(spec, tokens, encoding)
        frames = [
            _encode_exact(k, v, encoding.coder)
            if encoding.rate is Rate.EXACT
            else _encode_quantised(k, v, encoding)
            for k, v in (_cut(keys, values, geometry, frame) for frame in range(geometry.frame_count))
        ]
    digest = klt.calibration.digest if klt else None
    header, header_data = write_header(
        spec.digest, chunk_id, encoding, geometry, frames, digest, token_order, keys_to_sign
    )
    return EncodedChunk(header, [header_data, *frames], guarded)


def chunk_geometry(spec: ModelSpec, tokens: int, encoding: Encoding, klt: KLT | None = None) -> Geometry:
    """Geometry of a chunk. It depends on the encoding and, with a KLT, on the calibration."""
    if klt is not None:
        period_layers = klt.calibration.period_layers
    elif encoding.is_video:
        period_layers = LAYERS_PER_PICTURE
    else:
        period_layers = period_layers_of(spec, encoding.period_layers or PERIOD_LAYERS)
    return Geometry.of(spec, tokens, period_layers, encoding.frame_tokens)


def decode_frames(
    header: ChunkHeader,
    first_frame: int,
    frame_count: int,
    data: Buffer,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    *,
    klt: KLT | None = None,
    prediction: Prediction | None = None,
) -> None:
    """Verifies and decodes `frame_count` consecutive frames of one period. `data` holds their bytes without gaps.

    `out_keys` and `out_values` are [layers_in_period, kv_heads, tokens of these frames, head_dim] of the chunk's dtype,
    with any strides. Frames of KLT coefficients are restored on the tensors' own device; all others need host memory.
    `klt` is the calibration that the chunk names, `prediction` its prediction for the chunk.

    Thread-safe. Each thread keeps scratch memory for one frame, per value: .5 bytes for `exact` of 16 bits, 2 for
    `exact` of 32 bits, 8 for the lossy rates. KLT frames need 4 more bytes per value during the call. Raises
    ChunkFormatError or a subclass for invalid bytes (the tensors may be partly written), InvalidKVError for tensors
    of another shape, dtype or device, CalibrationError for another calibration than the chunk names.
    """
    together = FramesTogether()
    together.read(
        header, first_frame, frame_count, data, out_keys, out_values, klt=klt, prediction=prediction
    )
    together.restore_()


def _encode_klt(
    keys: torch.Tensor,
    values: torch.Tensor,
    spec: ModelSpec,
    encoding: Encoding,
    klt: KLT | None,
    features: torch.Tensor | None,
    sinks: int,
) -> tuple[list[bytes], dict[str, int], Geometry]:
    """The frames, the counts of guarded frames (see `EncodedChunk.guarded`), and the chunk's geometry."""
    klt = require_klt(klt, encoding)
    klt.calibration.require(spec)
    tokens = keys.shape[2]
    if features is None or len(features) != tokens:
        raise InvalidKVError(f"{encoding.name} needs the token_features of all {tokens} tokens")
    prediction = klt.predict(features)
    targets = [klt.target(encoding.rate, period) for period in range(len(klt.periods))]
    geometry = chunk_geometry(spec, tokens, encoding, klt)
    frames: list[bytes] = []
    guarded = {"finer": 0, "exact": 0}
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        rows = geometry.tokens_of(slot)
        k, v = _cut(keys, values, geometry, frame)
        coded = encode_klt_frame(
            k,
            v,
            prediction.at(period, slice(rows.start, rows.stop)),
            klt.periods[period],
            targets[period],
            [token - rows.start for token in rows if token < sinks],
            encoding.coder,
        )
        data = coded.data if coded else b""
        exact = b""
        if not data or len(data) > _SUSPICIOUS * 2 * k.nbytes:
            exact = _encode_exact(k, v, "zstd")
        if exact and (not data or len(exact) < len(data)):
            data = exact
            guarded["exact"] += 1
        elif coded and coded.guarded:
            guarded["finer"] += 1
        frames.append(data)
    return frames, guarded, geometry


def _cut(
    keys: torch.Tensor, values: torch.Tensor, geometry: Geometry, frame: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one frame, in host memory."""
    period, slot = divmod(frame, geometry.frames_per_period)
    layers, rows = geometry.layers_of(period), geometry.tokens_of(slot)
    place = np.s_[layers.start : layers.stop, :, rows.start : rows.stop]
    return keys[place].detach().cpu(), values[place].detach().cpu()


def _encode_exact(keys: torch.Tensor, values: torch.Tensor, coder_name: str) -> bytes:
    both = [words_of(tensor.contiguous()) for tensor in (keys, values)]
    if coder_name == "raw":
        writer = PayloadWriter(PayloadKind.VERBATIM)
        writer.add(*(words.data for words in both))
        return writer.frame()
    writer = PayloadWriter(PayloadKind.BYTE_PLANES)
    for words in both:
        encode_words(words, writer)
    return writer.frame()


def _encode_quantised(keys: torch.Tensor, values: torch.Tensor, encoding: Encoding) -> bytes:
    rate = encoding.rate
    step_per_rms = STEP_PER_RMS[rate] if isinstance(rate, Rate) else rate
    return encode_quantised(keys, values, encoding.coder, step_per_rms) or _encode_exact(keys, values, "zstd")
