"""Precision at which torch multiplies float32 matrices."""

from collections.abc import Callable, Mapping

import torch

_BACKENDS = ("cuda", "mkldnn")

_WORDS: Mapping[tuple[str, ...], str] = {
    ("ieee", "ieee"): "highest",
    ("tf32", "tf32"): "high",
    ("tf32", "bf16"): "medium",
}
"""Backend settings that `torch.set_float32_matmul_precision` makes for each of its words, in order of the backends.
`none` means `ieee`."""

_of_backend: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)
"""None before torch 2.9, which has one setting for all backends."""


def float32_matmul_precision() -> str:
    """The word that would have to be passed to `torch.set_float32_matmul_precision` for the current settings:
    `highest`, `high` or `medium`. Where the backends differ, each backend's setting: `cuda=tf32 mkldnn=ieee`.

    torch's own `get_float32_matmul_precision` raises RuntimeError in that case.
    """
    if _of_backend is None:
        return torch.get_float32_matmul_precision()
    settings = tuple(_of_backend(backend, "matmul").replace("none", "ieee") for backend in _BACKENDS)
    apart = " ".join(f"{backend}={setting}" for backend, setting in zip(_BACKENDS, settings, strict=True))
    return _WORDS.get(settings, apart)
