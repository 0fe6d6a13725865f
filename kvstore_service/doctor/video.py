"""Checks of the video coders: HEVC on the CPU, and NVIDIA's decoder (NVDEC) and encoder (NVENC) engines."""

import ctypes
import functools
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from kvstore_service.doctor.finding import Finding, missing, present

# Creating a CUDA context on an idle GPU can take seconds.
NVIDIA_TIMEOUT_S = 10.0

_CPU_INSTEAD = "The coders zstd and hevc-cpu need no GPU."
_INSTALL = "pip install 'kvstore-service[nvidia]'"
_VIDEO_CAPABILITY = "In a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video."

# Runs in a separate process: importing PyNvVideoCodec loads driver libraries, which may hang or crash.
_NVIDIA_PROBE = """
import json
import PyNvVideoCodec as nvc
decodes = {}
for name, chroma in nvc.cudaVideoChromaFormat.__members__.items():
    caps = nvc.GetDecoderCaps(gpuid=0, codec=nvc.cudaVideoCodec.HEVC, chromaformat=chroma, bitdepth=8)
    decodes[name] = caps.get("num_decoder_engines", 0)
try:
    encoder, why = nvc.GetEncoderCaps(gpuid=0, codec="hevc"), ""
except Exception as error:
    encoder, why = {}, str(error)
print(json.dumps({
    "decodes": decodes, "encoders": encoder.get("num_encoder_engines", 0),
    "lossless": bool(encoder.get("support_lossless_encode", 0)), "why": why,
}))
"""


def hevc_cpu() -> Finding:
    """Encodes and decodes one picture of noise with x265."""
    import numpy as np

    from kvstore_codec.coders import coder
    from kvstore_codec.errors import CoderUnavailableError

    try:
        hevc = coder("hevc-cpu")
    except CoderUnavailableError as error:
        return missing(str(error), "pip install av")
    plane = np.random.default_rng(0).integers(0, 256, (64, 256), dtype=np.uint8)
    decoded = np.empty_like(plane)
    hevc.decode(hevc.encode(plane), decoded)
    if not np.array_equal(plane, decoded):
        return missing("a decoded picture differs from the encoded one", "Use the coder zstd.")
    return present(f"PyAV {version('av')}, a picture encoded and decoded without loss")


def nvdec() -> Finding:
    found = _nvidia()
    if isinstance(found, Finding):
        return found
    decodes = {name: engines for name, engines in found["decodes"].items() if engines}
    if not decodes:
        return missing("this GPU does not decode 8-bit HEVC", _CPU_INSTEAD)
    return present(f"{max(decodes.values())} engines decode 8-bit HEVC {', '.join(decodes)}")


def nvenc() -> Finding:
    found = _nvidia()
    if isinstance(found, Finding):
        return found
    if not found["encoders"]:
        reason = found["why"] or "this GPU has no encoder engine (A100, H100, H200 and B200 have none)"
        return missing(reason, "Encode with hevc-cpu; NVDEC decodes it.")
    lossless = "with" if found["lossless"] else "without"
    return present(f"{found['encoders']} engines encode HEVC, {lossless} a lossless mode")


@functools.cache
def _nvidia() -> dict[str, Any] | Finding:
    """Capabilities of the video engines, or the finding that says why they are missing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return missing("no NVIDIA GPU: the driver library libcuda.so.1 cannot be loaded", _CPU_INSTEAD)
    if importlib.util.find_spec("PyNvVideoCodec") is None:
        return missing("PyNvVideoCodec is not installed", _INSTALL)
    for library in ("libnvcuvid.so.1", "libnvidia-encode.so.1"):  # the import needs both, even to decode
        try:
            ctypes.CDLL(library)
        except OSError as error:
            return missing(f"the driver's video libraries are missing: {error}", _VIDEO_CAPABILITY)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _NVIDIA_PROBE],
            capture_output=True,
            text=True,
            timeout=NVIDIA_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return missing(f"PyNvVideoCodec did not answer within {NVIDIA_TIMEOUT_S:.0f} s", _CPU_INSTEAD)
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        return missing(f"PyNvVideoCodec cannot be used: {reason}", _CPU_INSTEAD)
    capabilities: dict[str, Any] = json.loads(probe.stdout)
    return capabilities
