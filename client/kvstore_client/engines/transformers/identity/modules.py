"""The modules of a model under the names that they have when nothing is compiled."""

from collections.abc import Iterator

from torch import nn

_COMPILED = "_orig_mod"
"""What `torch.compile(module)` calls the module it wraps, in names of tensors too."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, or the one inside when `torch.compile` has wrapped it."""
    while (inner := module._modules.get(_COMPILED)) is not None:
        module = inner
    return module


def uncompiled_name(name: str) -> str:
    """The name of a tensor or module as it was before any module on its path was compiled."""
    return name.replace(f"{_COMPILED}.", "")


def named_modules(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root` and itself, by its name before compilation. A module in two places comes twice."""
    module = uncompiled(root)
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{name}.{child_name}" if name else child_name)
