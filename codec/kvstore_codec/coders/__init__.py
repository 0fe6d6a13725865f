"""Registry of coders by name. A coder's module, and the library that it uses, is imported on first use."""

from __future__ import annotations

import functools
import importlib

from kvstore_codec.coders.base import Coder, Plane
from kvstore_codec.errors import CoderUnavailableError, UnknownEncodingError

__all__ = ["Coder", "Plane", "availability", "coder", "decoder"]

_CODERS = {
    "raw": "kvstore_codec.coders.raw:RawCoder",
    "zstd": "kvstore_codec.coders.zstd:ZstdCoder",
    "pco": "kvstore_codec.coders.pco:PcoCoder",
    "hevc-cpu": "kvstore_codec.coders.hevc.cpu:HevcCpuCoder",
    "hevc-cpu-420": "kvstore_codec.coders.hevc.cpu:HevcCpu420Coder",
    "hevc-nvdec": "kvstore_codec.coders.hevc.nvidia:NvdecCoder",
    "hevc-nvenc": "kvstore_codec.coders.hevc.nvidia:NvencCoder",
}


@functools.cache
def coder(name: str) -> Coder:
    """The coder of this name. Raises UnknownEncodingError for an unknown name, and CoderUnavailableError, with the
    reason, for a coder that cannot run on this machine."""
    if name not in _CODERS:
        raise UnknownEncodingError(f"there is no coder {name!r}; known are {', '.join(_CODERS)}")
    module, _, class_name = _CODERS[name].partition(":")
    try:
        found: Coder = getattr(importlib.import_module(module), class_name)()
    except ImportError as error:
        raise CoderUnavailableError(f"coder {name!r} cannot run here: {error}") from error
    return found


def decoder(name: str) -> Coder:
    """The coder that decodes the output of coder `name` on this machine. NVENC writes plain HEVC, which any decodes."""
    if name != "hevc-nvenc":
        return coder(name)
    return coder("hevc-cpu" if availability("hevc-nvdec") else "hevc-nvdec")


def availability(name: str) -> str | None:
    """The reason why the coder cannot run on this machine; None if it can."""
    try:
        coder(name)
    except CoderUnavailableError as error:
        return str(error)
    return None
