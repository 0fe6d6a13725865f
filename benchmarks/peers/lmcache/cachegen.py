"""Encode and decode KV with LMCache's CacheGen, through its serializer and deserializer, on the CPU.

    benchmarks/peers/lmcache/.venv/bin/python benchmarks/peers/lmcache/cachegen.py IN OUT --bins 32,16 --json F

Every `*.safetensors` in the folder IN contains `keys` and `values` [layers, kv_heads, tokens, head_dim]. The decoded
tensors are written to a file of the same name in OUT. The JSON is {lmcache_version, config, files: [row]} with one row
per file {file, layers, kv_heads, tokens, head_dim, values, kv_bytes, chunks, total_bytes, payload_bytes, cdf_bytes,
scale_bytes, encode_s, decode_s}. `values` is the number of values of K and V together, and `kv_bytes` their uncoded
size. `total_bytes` is what LMCache would store: the entropy-coded part (`payload_bytes`), probability tables
(`cdf_bytes`), the largest magnitude of each token (`scale_bytes`), and lengths and framing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import lmcache
import torch
from lmcache.storage_backend.serde.cachegen_basics import CacheGenGPUEncoderOutput, QuantizationSpec
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import (
    BytesBufferMemoryObj,
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.naive_serde.cachegen_basics import CacheGenConfig
from lmcache.v1.storage_backend.naive_serde.cachegen_decoder import CacheGenDeserializer
from lmcache.v1.storage_backend.naive_serde.cachegen_encoder import CacheGenSerializer
from safetensors.torch import load_file, save_file

# Numbers of bins in CacheGen's default: more for the first layers, fewer for the rest.
FIRST_BINS, REST_BINS = 32, 16
# Symbols are int8, and at least one is needed on either side of zero.
MIN_BINS, MAX_BINS = 4, 128


def main() -> None:
    arguments = _arguments()
    _stay_on_one_core()
    files = sorted(arguments.input.glob("*.safetensors"))
    if not files:
        sys.exit(f"no *.safetensors in {arguments.input}")
    for folder in (arguments.output, arguments.json.parent):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in files:
        tensors = load_file(file)
        codec = CacheGen(tensors["keys"], arguments.bins, arguments.chunk_tokens)
        keys, values, row = codec.round_trip(tensors["keys"], tensors["values"])
        save_file({"keys": keys, "values": values}, arguments.output / file.name)
        rows.append({"file": file.name} | row)
        print(f"{file.name}: {8 * row['total_bytes'] / row['values']:.2f} bits/value", file=sys.stderr)
    config = {
        "bins": "default" if arguments.bins is None else ",".join(map(str, arguments.bins)),
        "chunk_tokens": arguments.chunk_tokens,
        **asdict(codec.quantisation),
    }
    result = {"lmcache_version": lmcache.__version__, "config": config, "files": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


class CacheGen:
    """CacheGen for KV of one shape, [layers, kv_heads, any, head_dim], and dtype."""

    def __init__(self, like: torch.Tensor, bins: tuple[int, int] | None, chunk_tokens: int) -> None:
        self.layers, self.heads, _, self.head_dim = like.shape
        self.chunk_tokens = chunk_tokens
        engine = LMCacheEngineConfig.from_defaults(chunk_size=chunk_tokens)
        with tempfile.TemporaryDirectory() as model:
            # For a model that CacheGen does not list, the default depends on the number of layers in its config.
            config = {"model_type": "llama", "num_hidden_layers": self.layers}
            Path(model, "config.json").write_text(json.dumps(config))
            metadata = LMCacheMetadata(
                model_name=model,
                world_size=1,
                local_world_size=1,
                worker_id=0,
                local_worker_id=0,
                kv_dtype=like.dtype,
                kv_shape=(self.layers, 2, chunk_tokens, self.heads, self.head_dim),
                chunk_size=chunk_tokens,
            )
            self.serializer = CacheGenSerializer(engine, metadata)
            self.deserializer = CacheGenDeserializer(engine, metadata)
        self.quantisation = self.serializer.cachegen_config
        if bins is not None:
            self._use(bins)

    def _use(self, bins: tuple[int, int]) -> None:
        """Sets the numbers of bins. LMCache has no setting for them, so this replaces the default in its objects."""
        bins_now = {FIRST_BINS: bins[0], REST_BINS: bins[1]}

        def replaced(specs: list[QuantizationSpec]) -> list[QuantizationSpec]:
            return [QuantizationSpec(spec.start_layer, spec.end_layer, bins_now[spec.bins]) for spec in specs]

        default = self.quantisation
        self.quantisation = CacheGenConfig(
            default.nlayers, replaced(default.kspecs), replaced(default.vspecs)
        )
        for side in (self.serializer, self.deserializer):
            side.cachegen_config = self.quantisation
            side.key_bins = side.make_key_bins(self.quantisation)
            side.value_bins = side.make_value_bins(self.quantisation)

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, int | float]]:
        """Encodes and decodes KV. Returns keys and values in their original shape, and the row without `file`."""
        # LMCache's own layout of a chunk, so that the conversion is not timed.
        chunks = [
            torch.stack(pair).transpose(2, 3).flatten(3).contiguous()  # [2, layers, tokens, heads * head_dim]
            for pair in zip(keys.split(self.chunk_tokens, 2), values.split(self.chunk_tokens, 2), strict=True)
        ]
        # Warm-up: numba compiles the kernels on their first call.
        self.deserializer.deserialize(self.serializer.serialize(_memory_object(chunks[0])))
        coded, decoded = [], []
        encode_s = decode_s = 0.0
        for chunk in chunks:
            original = _memory_object(chunk)
            start = time.perf_counter()
            coded.append(bytes_object := self.serializer.serialize(original))
            between = time.perf_counter()
            restored = self.deserializer.deserialize(bytes_object)
            decode_s += time.perf_counter() - between
            encode_s += between - start
            decoded.append(restored.raw_data)
        whole = torch.cat(decoded, 2).unflatten(3, (self.heads, self.head_dim)).transpose(2, 3)
        sizes = {
            "values": keys.numel() + values.numel(),
            "kv_bytes": keys.nbytes + values.nbytes,
            "chunks": len(chunks),
            **_sizes(coded),
        }
        shape = dict(zip(("layers", "kv_heads", "tokens", "head_dim"), keys.shape, strict=True))
        times = {"encode_s": encode_s, "decode_s": decode_s}
        return whole[0].contiguous(), whole[1].contiguous(), shape | sizes | times


def _stay_on_one_core() -> None:
    """Pins the process to one core. CacheGen's thread pool holds the interpreter lock and is 1.5 times slower on
    two."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def _memory_object(chunk: torch.Tensor) -> TensorMemoryObj:
    """A chunk as LMCache's CPU memory passes it to a serializer."""
    metadata = MemoryObjMetadata(
        shape=chunk.shape,
        dtype=chunk.dtype,
        address=0,
        phy_size=chunk.nbytes,
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
    )
    return TensorMemoryObj(chunk.view(torch.uint8).flatten(), metadata, parent_allocator=None)


def _sizes(coded: list[BytesBufferMemoryObj]) -> dict[str, int]:
    """Sizes of the coded chunks and of their parts, bytes."""
    parts = [CacheGenGPUEncoderOutput.from_bytes(chunk.byte_array) for chunk in coded]
    return {
        "total_bytes": sum(chunk.get_size() for chunk in coded),
        "payload_bytes": sum(stream.bytestream.nbytes for part in parts for stream in part.data_chunks),
        "cdf_bytes": sum(part.cdf.nbytes for part in parts),
        "scale_bytes": sum(part.max_tensors_key.nbytes + part.max_tensors_value.nbytes for part in parts),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encode and decode KV with LMCache's CacheGen.")
    parser.add_argument("input", type=Path, help="folder with *.safetensors")
    parser.add_argument("output", type=Path, help="folder for the decoded files")
    parser.add_argument("--json", type=Path, required=True, help="file for sizes and times")
    parser.add_argument(
        "--bins",
        type=_bins,
        default="default",
        help=f"'default' ({FIRST_BINS},{REST_BINS}); N bins for all layers; or FIRST,REST bins for the layers that "
        f"have {FIRST_BINS} and {REST_BINS} by default",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="tokens per chunk; LMCache's default is 256"
    )
    return parser.parse_args()


def _bins(text: str) -> tuple[int, int] | None:
    if text == "default":
        return None
    numbers = [int(number) for number in text.split(",")]
    first, rest = numbers if len(numbers) > 1 else numbers * 2
    # Even numbers, because an odd number has the same levels as the even number below it. FIRST >= REST, because the
    # tables for K and V must have the same length.
    if first % 2 or rest % 2 or not MIN_BINS <= rest <= first <= MAX_BINS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: use even numbers from {MIN_BINS} to {MAX_BINS}, FIRST not below REST"
        )
    return first, rest


if __name__ == "__main__":
    main()
