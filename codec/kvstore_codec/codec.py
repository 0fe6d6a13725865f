"""KV of one chunk <-> encoded frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import CalibrationError, ChunkFormatError, CodecError, InvalidKVError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId
from kvstore_codec.klt_frames import KLT, decode_klt_frame, encode_klt_frame, require_features
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind, PayloadReader
from kvstore_codec.quantise import decode_quantised, encode_quantised
from kvstore_codec.words import decode_words, encode_words, words_of

# A lossy frame with this share of its KV's bytes may be no smaller than an exact one.
_SUSPICIOUS = 0.5


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk ready to be sent: `parts` are the header's bytes and then each frame, in order, not joined."""

    header: ChunkHeader
    parts: list[bytes]

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
) -> EncodedChunk:
    """Encodes `keys` (before RoPE) and `values`, both [layers, kv_heads, tokens, head_dim] with any strides,
    on any device, of the dtype of `spec`.

    An encoding with the transform "klt" needs the model's calibration, ready for use, and the chunk's `token_features`
    [tokens, features]; its first `sinks` tokens are kept exact (`Calibration.sinks` where a chunk begins a text).

    Besides the result it needs scratch memory for one frame at a time: about 4 bytes per value of a frame for
    `exact`, 24 for the lossy rates. Raises InvalidKVError for tensors that do not fit `spec`, CalibrationError for
    a calibration that is missing or of another model, CoderUnavailableError for a coder this machine does not have.
    """
    if keys.ndim != 4 or not keys.numel():
        raise InvalidKVError(f"keys of shape {list(keys.shape)} are not [layers, kv_heads, tokens, head_dim]")
    tokens = keys.shape[2]
    _require_kv("keys", keys, (spec.layers, spec.kv_heads, tokens, spec.head_dim), spec.dtype)
    _require_kv("values", values, tuple(keys.shape), spec.dtype)
    if encoding.needs_calibration:
        klt = _require_klt(klt, encoding)
        klt.calibration.require(spec)
        features = require_features(features, tokens, klt.calibration)
        geometry = Geometry.of(spec, tokens, klt.calibration.period_layers)
    else:
        klt, geometry = None, Geometry.of(spec, tokens)
    frames: list[bytes] = []
    for period in range(geometry.periods):
        layers = geometry.layers_of(period)
        for slot in range(geometry.frames_per_period):
            rows = geometry.tokens_of(slot)
            cut = np.s_[layers.start : layers.stop, :, rows.start : rows.stop]
            k, v = keys[cut].detach().cpu(), values[cut].detach().cpu()
            if klt is None or features is None:
                frames.append(_ENCODERS[encoding.rate](k, v, encoding.coder))
                continue
            parts = encode_klt_frame(
                k,
                v,
                features[rows.start : rows.stop],
                klt.periods[period],
                klt.target(encoding.rate),
                [token - rows.start for token in rows if token < sinks],
                encoding.coder,
            )
            coded = b"".join([bytes([PayloadKind.KLT]), *parts]) if parts else b""
            if not coded or len(coded) > _SUSPICIOUS * 2 * k.nbytes:
                exact = _encode_exact(k, v, "zstd")
                coded = exact if not coded else min(coded, exact, key=len)
            frames.append(coded)
    digest = klt.calibration.digest if klt else None
    header, header_data = write_header(spec.digest, chunk_id, encoding, geometry, frames, digest)
    return EncodedChunk(header, [header_data, *frames])


def decode_frame(
    header: ChunkHeader,
    frame: int,
    data: Buffer,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    *,
    klt: KLT | None = None,
    features: torch.Tensor | None = None,
) -> None:
    """Verifies the checksum of `data`, the bytes of one frame, and decodes them into the caller's tensors,
    both [layers_in_period, kv_heads, tokens_in_frame, head_dim] of the chunk's dtype, with any strides, in
    host memory. `klt` and `features` (of the whole chunk, [tokens, features]) are those it was encoded with.

    May be called from many threads at once; each keeps scratch memory for one frame: per value of it .5 bytes
    for `exact` of 16 bits, 2 for `exact` of 32 bits, 8 for the lossy rates. Raises ChunkFormatError children for bad
    bytes (the tensors may then be partly written), InvalidKVError for tensors of another shape, dtype or
    device, CalibrationError for a calibration other than the one the chunk names.
    """
    geometry = header.geometry
    if not 0 <= frame < geometry.frame_count:
        raise ChunkFormatError(f"chunk {header.chunk_id.short} has no frame {frame}")
    shape = geometry.frame_shape(frame)
    _require_kv("out_keys", out_keys, shape, geometry.dtype)
    _require_kv("out_values", out_values, shape, geometry.dtype)
    if not (out_keys.is_cpu and out_values.is_cpu):
        raise InvalidKVError(f"frames are decoded into host memory, not into {out_keys.device} tensors")
    header.verify_frame(frame, data)
    reader = PayloadReader(data)
    keys, values, coder = out_keys.detach(), out_values.detach(), header.encoding.coder
    try:
        kind = reader.kind()
        if kind is PayloadKind.KLT:
            maps, chunk_features = _require_decoder(header, klt, features)
            period, slot = divmod(frame, geometry.frames_per_period)
            rows = geometry.tokens_of(slot)
            frame_features = chunk_features[rows.start : rows.stop]
            decode_klt_frame(reader, keys, values, frame_features, maps.periods[period], coder)
        else:
            _DECODERS[kind](reader, keys, values, coder)
        reader.finish()
    except CodecError as error:
        error.add_note(f"in frame {frame} of chunk {header.chunk_id.short} ({header.encoding.name})")
        raise


def _encode_exact(keys: torch.Tensor, values: torch.Tensor, coder_name: str) -> bytes:
    both = [words_of(tensor.contiguous()) for tensor in (keys, values)]
    if coder_name == "raw":
        return b"".join([bytes([PayloadKind.VERBATIM]), *(words.tobytes() for words in both)])
    planes = [part for words in both for part in encode_words(words)]
    return b"".join([bytes([PayloadKind.BYTE_PLANES]), *planes])


def _encode_high(keys: torch.Tensor, values: torch.Tensor, coder_name: str) -> bytes:
    parts = encode_quantised(keys, values, coder_name)
    if parts is None:
        return _encode_exact(keys, values, "zstd")
    return b"".join([bytes([PayloadKind.QUANTISED]), *parts])


def _decode_verbatim(reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, _coder: str) -> None:
    for out in (keys, values):
        words = words_of(out)
        words[...] = np.frombuffer(reader.take(words.nbytes), words.dtype).reshape(words.shape)


def _decode_byte_planes(reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, _coder: str) -> None:
    for out in (keys, values):
        decode_words(reader, words_of(out))


def _require_klt(klt: KLT | None, encoding: Encoding) -> KLT:
    if klt is None:
        raise CalibrationError(
            f"{encoding.name} needs the model's calibration; make one with `kvstore calibrate`"
        )
    return klt


def _require_decoder(
    header: ChunkHeader, klt: KLT | None, features: torch.Tensor | None
) -> tuple[KLT, torch.Tensor]:
    if header.calibration is None:
        raise ChunkFormatError(f"a frame of KLT coefficients in a chunk coded as {header.encoding.name}")
    klt = _require_klt(klt, header.encoding)
    if klt.calibration.digest != header.calibration:
        raise CalibrationError(
            f"chunk {header.chunk_id.short} was coded with calibration {header.calibration.hex()[:16]}, "
            f"not with {klt.calibration.digest.hex()[:16]}"
        )
    geometry, shape = header.geometry, klt.calibration.periods[0].whitening.shape
    fits = (len(klt.periods), klt.calibration.period_layers, shape[2], shape[3]) == (
        geometry.periods,
        geometry.period_layers,
        geometry.kv_heads,
        geometry.head_dim,
    )
    if not fits or sum(period.layers for period in klt.calibration.periods) != geometry.layers:
        raise ChunkFormatError(f"chunk {header.chunk_id.short} is not of the shape of its calibration")
    return klt, require_features(features, geometry.tokens, klt.calibration)


def _require_kv(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: KVDtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype.torch:
        raise InvalidKVError(
            f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )


_ENCODERS: dict[Rate, Callable[[torch.Tensor, torch.Tensor, str], bytes]] = {
    Rate.EXACT: _encode_exact,
    Rate.HIGH: _encode_high,
}
_DECODERS: dict[PayloadKind, Callable[[PayloadReader, torch.Tensor, torch.Tensor, str], None]] = {
    PayloadKind.VERBATIM: _decode_verbatim,
    PayloadKind.BYTE_PLANES: _decode_byte_planes,
    PayloadKind.QUANTISED: decode_quantised,
}
