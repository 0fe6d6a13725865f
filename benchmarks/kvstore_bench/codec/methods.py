"""The names of all rows of the benchmark, and the method of each."""

import re
from collections.abc import Sequence

import torch

from kvstore_bench.codec.cachegen import CacheGen
from kvstore_bench.codec.method import Method
from kvstore_bench.codec.minmax import MinMax
from kvstore_bench.codec.ours import Ours
from kvstore_bench.codec.texts import CONTEXT_TOKENS
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.klt_frames import KLT

_RATES = ("high", "medium", "low")
ROWS = (
    "exact-zstd",
    *(f"{rate}-{coder}" for rate in _RATES for coder in ("zstd", "hevc-cpu")),
    *(f"{rate}-klt-{coder}" for rate in _RATES for coder in ("pco", "zstd", "hevc-cpu")),
    *(f"medium-klt-{coder}@256" for coder in ("pco", "hevc-cpu")),
    *(f"minmax{bits}-{coder}" for bits in (8, 6, 4) for coder in ("hevc-cpu", "zstd")),
    *(f"cachegen-{bins}" for bins in ("default", 16, 20, 24, 32, 48, 64)),
    *(f"cachegen-{bins}@1024" for bins in ("default", 32)),
)
QUICK_ROWS = (
    "exact-zstd",
    "medium-zstd",
    "medium-hevc-cpu",
    "medium-klt-pco",
    "medium-klt-hevc-cpu",
    "medium-klt-pco@256",
    "minmax6-zstd",
    "cachegen-default",
)
OUT_OF_DOMAIN_ROWS = ("medium-klt-pco", "high-klt-pco")

_MINMAX = re.compile(r"minmax(\d)-(.+)")
_CACHEGEN = re.compile(r"cachegen-(default|\d+)(?:@(\d+))?")


def require_rows(names: Sequence[str]) -> None:
    """Raises UnknownEncodingError for a name that is not a row, and ConfigurationError for an empty list."""
    if not names:
        raise ConfigurationError(f"no rows are given to measure; --rows may name {', '.join(ROWS)}")
    for name in names:
        if found := _MINMAX.fullmatch(name):
            MinMax(int(found[1]), found[2])
        elif not is_cachegen(name):
            Encoding.parse(name)


def is_cachegen(name: str) -> bool:
    return _CACHEGEN.fullmatch(name) is not None


def needs_calibration(name: str) -> bool:
    is_other = is_cachegen(name) or _MINMAX.fullmatch(name)
    return not is_other and Encoding.parse(name).needs_calibration


def method_named(name: str, observed: ObservedModel, klt: KLT | None) -> Method:
    """The method of a row. `klt` is required if `needs_calibration(name)`."""
    if found := _MINMAX.fullmatch(name):
        return MinMax(int(found[1]), found[2])
    if found := _CACHEGEN.fullmatch(name):
        rotary = rotary_tables(observed.model, CONTEXT_TOKENS, torch.float32, "cpu")
        return CacheGen(found[1], int(found[2] or CHUNK_TOKENS), rotary)
    return Ours(Encoding.parse(name), klt)
