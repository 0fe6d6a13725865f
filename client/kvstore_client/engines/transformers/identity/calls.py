"""Functions that make up a model's code, and the torch functions that they call by name."""

from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

_OPERATORS = frozenset(
    f"__{prefix}{name}__"
    for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or")
    for prefix in ("", "r", "i")
) | {"__getitem__", "__setitem__", "__neg__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__invert__"}
"""Tensor methods that code calls without naming them."""


def functions_of(classes: Iterable[type], files: Iterable[ModuleType]) -> list[FunctionType]:
    """Functions of these classes and files, and the functions wrapped by their decorators."""
    values = [value for owner in (*classes, *files) for value in vars(owner).values()]
    return list(dict.fromkeys(function for value in values for function in _functions(called_by(value))))


def called_of_torch(functions: Iterable[FunctionType]) -> list[tuple[Any, str]]:
    """Attributes of torch, and methods of tensors, that these functions may call: pairs of owner and name. Methods that
    tensors inherit from C code are left out, because they cannot be replaced."""
    names = sorted({name for function in functions for name in function.__code__.co_names} | _OPERATORS)
    return [(owner, name) for owner in (torch, torch.Tensor) for name in names if name in vars(owner)]


def called_by(value: Any) -> Any:
    """The function that a class attribute calls."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _functions(value: Any) -> Iterator[FunctionType]:
    while value is not None:
        if isinstance(value, FunctionType):
            yield value
        value = getattr(value, "__wrapped__", None) if callable(value) else None
