"""KV of one chunk <-> encoded frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import CalibrationError, ChunkFormatError, CodecError, InvalidKVError
from kvstore_codec.geometry import PERIOD_LAYERS, Geometry
from kvstore_codec.identity import ChunkId
from kvstore_codec.klt_frames import KLT, DecodedFrames, Prediction, encode_klt_frame
from kvstore_codec.layouts.token_frames import LAYERS_PER_PICTURE
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind, PayloadReader
from kvstore_codec.quantise import STEP_PER_RMS, decode_quantised, encode_quantised
from kvstore_codec.words import decode_words, encode_words, words_of

# A lossy frame with this share of its KV's bytes may be no smaller than an exact one.
_SUSPICIOUS = 0.5


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk ready to be sent: `parts` are the header's bytes and then each frame, in order, not joined."""

    header: ChunkHeader
    parts: list[bytes]
    guarded: Mapping[str, int]
    """Frames whose KV is unlike the calibration's: how many were coded with a "finer" step, and how many "exact"."""

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
    header, header_data = write_header(spec.digest, chunk_id, encoding, geometry, frames, digest)
    return EncodedChunk(header, [header_data, *frames], guarded)


def chunk_geometry(spec: ModelSpec, tokens: int, encoding: Encoding, klt: KLT | None = None) -> Geometry:
    """How a chunk is cut: its encoding and, with a KLT, its calibration say so."""
    if klt is not None:
        period_layers = klt.calibration.period_layers
    else:
        period_layers = LAYERS_PER_PICTURE if encoding.is_video else PERIOD_LAYERS
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
    """Verifies the checksums of `data`, the bytes of neighbouring frames of one period back to back, and decodes them
    into the caller's tensors, both [layers_in_period, kv_heads, tokens of these frames, head_dim] of the chunk's
    dtype, with any strides. Frames of KLT coefficients are restored together, on the tensors' own device; all others
    need host memory. `klt` is the calibration that the chunk names, `prediction` what it predicts for the chunk.

    May be called from many threads at once; each keeps scratch memory for one frame: per value of it .5 bytes
    for `exact` of 16 bits, 2 for `exact` of 32 bits, 8 for the lossy rates; KLT frames need 4 more per value while the
    call lasts. Raises ChunkFormatError children for bad bytes (the tensors may then be partly written),
    InvalidKVError for tensors of another shape, dtype or device, CalibrationError for a calibration other than the
    one the chunk names.
    """
    geometry = header.geometry
    period, slot = divmod(first_frame, geometry.frames_per_period)
    inside = 0 <= first_frame < first_frame + frame_count <= geometry.frame_count
    if not inside or slot + frame_count > geometry.frames_per_period:
        raise ChunkFormatError(
            f"chunk {header.chunk_id.short} has no {frame_count} frames of one period from {first_frame} on"
        )
    begin, end = geometry.tokens_of(slot).start, geometry.tokens_of(slot + frame_count - 1).stop
    shape = len(geometry.layers_of(period)), geometry.kv_heads, end - begin, geometry.head_dim
    _require_kv("out_keys", out_keys, shape, geometry.dtype)
    _require_kv("out_values", out_values, shape, geometry.dtype)
    if out_keys.device != out_values.device:
        raise InvalidKVError(
            f"keys go to {out_keys.device}, values to {out_values.device}: one device is needed"
        )
    keys, values = out_keys.detach(), out_values.detach()
    view, offset, coder = memoryview(data).cast("B"), 0, header.encoding.coder
    together: DecodedFrames | None = None
    apart: list[tuple[PayloadKind, PayloadReader, int, slice]] = []
    for frame in range(first_frame, first_frame + frame_count):
        length = header.frame_lengths[frame]
        payload, offset = view[offset : offset + length], offset + length
        header.verify_frame(frame, payload)
        with _naming(header, frame):
            reader = PayloadReader(payload)
            kind = reader.kind()
            rows = geometry.tokens_of(frame % geometry.frames_per_period)
            tokens = slice(rows.start - begin, rows.stop - begin)
            if kind is not PayloadKind.KLT:
                apart.append((kind, reader, frame, tokens))
                continue
            if together is None:
                together = DecodedFrames(_require_decoder(header, klt).periods[period])
            together.read(reader, keys[:, :, tokens], tokens, coder)
            reader.finish()
    if together is not None:
        low = _require_prediction(header, prediction).at(period, slice(begin, end))
        together.restore_(low, keys, values)
    for kind, reader, frame, tokens in apart:
        if not keys.is_cpu:
            raise InvalidKVError(f"{header.encoding.name} is decoded into host memory, not {keys.device}")
        with _naming(header, frame):
            _DECODERS[kind](reader, keys[:, :, tokens], values[:, :, tokens], coder)
            reader.finish()
    if offset != view.nbytes:
        raise ChunkFormatError(f"{view.nbytes - offset} bytes too many for {frame_count} frames")


def _encode_klt(
    keys: torch.Tensor,
    values: torch.Tensor,
    spec: ModelSpec,
    encoding: Encoding,
    klt: KLT | None,
    features: torch.Tensor | None,
    sinks: int,
) -> tuple[list[bytes], dict[str, int], Geometry]:
    """Frames, what the guard did to them, and how the chunk is cut."""
    klt = _require_klt(klt, encoding)
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
        data = b"".join([bytes([PayloadKind.KLT]), *coded.parts]) if coded else b""
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
        return b"".join([bytes([PayloadKind.VERBATIM]), *(words.tobytes() for words in both)])
    planes = [part for words in both for part in encode_words(words)]
    return b"".join([bytes([PayloadKind.BYTE_PLANES]), *planes])


def _encode_quantised(keys: torch.Tensor, values: torch.Tensor, encoding: Encoding) -> bytes:
    rate = encoding.rate
    step_per_rms = STEP_PER_RMS[rate] if isinstance(rate, Rate) else rate
    parts = encode_quantised(keys, values, encoding.coder, step_per_rms)
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


def _require_decoder(header: ChunkHeader, klt: KLT | None) -> KLT:
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
    return klt


def _require_prediction(header: ChunkHeader, prediction: Prediction | None) -> Prediction:
    if prediction is None or prediction.tokens != header.geometry.tokens:
        raise InvalidKVError(
            f"chunk {header.chunk_id.short} ({header.encoding.name}) needs what its calibration predicts for all its "
            f"{header.geometry.tokens} tokens: KLT.predict of their token_features"
        )
    return prediction


@contextmanager
def _naming(header: ChunkHeader, frame: int) -> Iterator[None]:
    """An error in a frame says which one."""
    try:
        yield
    except CodecError as error:
        error.add_note(f"in frame {frame} of chunk {header.chunk_id.short} ({header.encoding.name})")
        raise


def _require_kv(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: KVDtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype.torch:
        raise InvalidKVError(
            f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape {list(tensor.shape)}"
        )


_DECODERS: dict[PayloadKind, Callable[[PayloadReader, torch.Tensor, torch.Tensor, str], None]] = {
    PayloadKind.VERBATIM: _decode_verbatim,
    PayloadKind.BYTE_PLANES: _decode_byte_planes,
    PayloadKind.QUANTISED: decode_quantised,
}
