"""Modules of a model under the names that they have without compilation."""

from collections.abc import Iterator

from torch import nn

_COMPILED = "_orig_mod"
"""Attribute under which `torch.compile(module)` keeps the wrapped module; also part of tensor names."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module, or the wrapped module when `torch.compile` has wrapped it."""
    while (inner := module._modules.get(_COMPILED)) is not None:
        module = inner
    return module


def uncompiled_name(name: str) -> str:
    """Name of a tensor or module before any module on its path was compiled."""
    return name.replace(f"{_COMPILED}.", "")


def named_modules(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root`, and `root` itself, by its uncompiled name. A module in two places comes twice."""
    module = uncompiled(root)
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{name}.{child_name}" if name else child_name)
