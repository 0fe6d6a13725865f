"""KV of one chunk <-> encoded frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader, write_header
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ChunkFormatError, CodecError, InvalidKVError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind, PayloadReader
from kvstore_codec.quantise import decode_quantised, encode_quantised
from kvstore_codec.words import Words, decode_words, encode_words

_WORD_DTYPES = {
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
}


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
) -> EncodedChunk:
    """Encodes `keys` (before RoPE) and `values`, both [layers, kv_heads, tokens, head_dim] with any strides,
    on any device, of the dtype of `spec`.

    Besides the result it needs scratch memory for one frame at a time: about 4 bytes per value of a frame for
    `exact`, 24 for `high`. Raises InvalidKVError for tensors that do not fit `spec`, CoderUnavailableError for
    a coder this machine does not have.
    """
    if keys.ndim != 4 or not keys.numel():
        raise InvalidKVError(f"keys of shape {list(keys.shape)} are not [layers, kv_heads, tokens, head_dim]")
    tokens = keys.shape[2]
    _require_kv("keys", keys, (spec.layers, spec.kv_heads, tokens, spec.head_dim), spec.dtype)
    _require_kv("values", values, tuple(keys.shape), spec.dtype)
    geometry = Geometry.of(spec, tokens)
    encode = _ENCODERS[encoding.rate]
    frames: list[bytes] = []
    for period in range(geometry.periods):
        layers = geometry.layers_of(period)
        for slot in range(geometry.frames_per_period):
            rows = geometry.tokens_of(slot)
            cut = np.s_[layers.start : layers.stop, :, rows.start : rows.stop]
            frames.append(encode(keys[cut].detach().cpu(), values[cut].detach().cpu(), encoding.coder))
    header, header_data = write_header(spec.digest, chunk_id, encoding, geometry, frames)
    return EncodedChunk(header, [header_data, *frames])


def decode_frame(
    header: ChunkHeader, frame: int, data: Buffer, out_keys: torch.Tensor, out_values: torch.Tensor
) -> None:
    """Verifies the checksum of `data`, the bytes of one frame, and decodes them into the caller's tensors,
    both [layers_in_period, kv_heads, tokens_in_frame, head_dim] of the chunk's dtype, with any strides, in
    host memory.

    May be called from many threads at once; each keeps scratch memory for one frame: per value of it .5 bytes
    for `exact` of 16 bits, 2 for `exact` of 32 bits, 8 for `high`. Raises ChunkFormatError children for bad
    bytes (the tensors may then be partly written), InvalidKVError for tensors of another shape, dtype or
    device.
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
    try:
        _DECODERS[reader.kind()](reader, out_keys.detach(), out_values.detach(), header.encoding.coder)
        reader.finish()
    except CodecError as error:
        error.add_note(f"in frame {frame} of chunk {header.chunk_id.short} ({header.encoding.name})")
        raise


def _encode_exact(keys: torch.Tensor, values: torch.Tensor, coder_name: str) -> bytes:
    both = [_words(tensor.contiguous()) for tensor in (keys, values)]
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
        words = _words(out)
        words[...] = np.frombuffer(reader.take(words.nbytes), words.dtype).reshape(words.shape)


def _decode_byte_planes(reader: PayloadReader, keys: torch.Tensor, values: torch.Tensor, _coder: str) -> None:
    for out in (keys, values):
        decode_words(reader, _words(out))


def _words(tensor: torch.Tensor) -> Words:
    """The bits of a float tensor in host memory, as a view."""
    integers, words = _WORD_DTYPES[tensor.dtype.itemsize]
    view: Words = tensor.view(integers).numpy().view(words)
    return view


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
