"""LMCache's CacheGen as a measured method. It runs in a separate process with its own virtual environment.

CacheGen gets KV as an engine caches it: keys after RoPE, rotated in f32 and rounded once to the model's dtype. Decoded
keys are rotated back in f32, which is exact except for f32 rounding.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvstore_bench.codec.fidelity import Passage
from kvstore_bench.codec.method import Coded
from kvstore_codec.errors import StartupError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.rope import RotaryTable, rotate_

INSTALL = "python benchmarks/peers/install.py lmcache"
_PEER = Path(__file__).parents[2] / "peers" / "lmcache"
_LIMIT_S = 1800


def installed() -> bool:
    """Whether CacheGen is installed. Peers are in the repository, not in an installed package."""
    return (_PEER / ".venv" / ".installed").exists()


class CacheGen:
    """CacheGen with LMCache's default bins (`cachegen-default`), or with one number of bins in all layers
    (`cachegen-<bins>`)."""

    def __init__(self, bins: str, chunk_tokens: int, rotary: Sequence[RotaryTable]) -> None:
        """`rotary` has a table for each layer, in f32, for the positions of a passage."""
        self._bins = bins
        self._chunk_tokens = chunk_tokens
        self._rotary = rotary

    @property
    def name(self) -> str:
        tokens = "" if self._chunk_tokens == CHUNK_TOKENS else f"@{self._chunk_tokens}"
        return f"cachegen-{self._bins}{tokens}"

    @property
    def labels(self) -> Mapping[str, str | int]:
        return {
            "method": "CacheGen",
            "layout": "cachegen",
            "coder": "cachegen",
            "rate": "default" if self._bins == "default" else f"{self._bins} bins",
            "frame_tokens": self._chunk_tokens,
        }

    def code(self, passages: Sequence[Passage]) -> Iterator[Coded]:
        given = []
        for passage in passages:
            keys = passage.keys.float()
            for layer, table in zip(keys, self._rotary, strict=True):
                rotate_(layer, table)
            given.append((keys.to(passage.keys.dtype), passage.values))
        for keys, values, row in round_trip(given, self._bins, self._chunk_tokens):
            keys = keys.float()
            for layer, table in zip(keys, self._rotary, strict=True):
                rotate_(layer, RotaryTable(table.cos, -table.sin))
            yield Coded(
                keys,
                values,
                row["total_bytes"],
                [row["kv_bytes"]],
                [row["encode_s"]],
                [row["decode_s"]],
                payload_bytes=row["payload_bytes"],
            )


def round_trip(
    given: Sequence[tuple[torch.Tensor, torch.Tensor]], bins: str, chunk_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Encodes and decodes KV with CacheGen. Yields keys (after RoPE) and values `[layers, kv_heads, tokens, head_dim]`
    as CacheGen returns them, and its row of sizes and times. Raises StartupError."""
    with tempfile.TemporaryDirectory(prefix="kvstore-cachegen-") as scratch:
        sent, returned, sizes = (Path(scratch, name) for name in ("in", "out", "sizes.json"))
        sent.mkdir()
        names = [f"{index:04d}.safetensors" for index in range(len(given))]
        for name, (keys, values) in zip(names, given, strict=True):
            save_file({"keys": keys.contiguous(), "values": values.contiguous()}, sent / name)
        _run(sent, returned, sizes, bins, chunk_tokens)
        rows = {row["file"]: row for row in json.loads(sizes.read_text())["files"]}
        for name in names:
            restored = load_file(returned / name)
            yield restored["keys"], restored["values"], rows[name]


def _run(given: Path, returned: Path, sizes: Path, bins: str, chunk_tokens: int) -> None:
    command = [_PEER / ".venv" / "bin" / "python", _PEER / "cachegen.py", given, returned]
    options = ["--bins", bins, "--chunk-tokens", str(chunk_tokens), "--json", str(sizes)]
    try:
        subprocess.run(
            [*map(str, command), *options], check=True, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise StartupError(
            f"LMCache's CacheGen with {bins} bins failed; run `{INSTALL}` to reinstall it:\n{said[-2000:]}"
        ) from error
