"""Detects code from outside torch and transformers that a model runs: patched functions, replaced modules."""

import os
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, cache_utils, masking_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore_client.engines.transformers.identity.calls import called_by, called_of_torch, functions_of
from kvstore_client.engines.transformers.identity.reference import Reference, ReferenceModule
from kvstore_client.reuse.identity import Refusal

_TRUSTED = (sys.stdlib_module_names | {"torch", "transformers"}) - {"unittest"}
"""Top-level packages whose functions may be part of a forward pass."""

_MOVE_THE_MODEL = frozenset({"to", "cuda", "musa", "mlu", "npu", "sdaa", "xpu"})
"""Methods that accelerate replaces by ones that warn; no forward pass calls them."""

_ONLY_MOVE = ("AlignDevicesHook", "CpuOffload")
"""accelerate's hooks that move inputs to a module's device and change no value."""


_CACHES = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)
"""Classes that keep the KV computed by a model."""


def classes_of(modules: Iterable[nn.Module]) -> list[type]:
    """Classes of these modules and of the caches that they fill, with their bases, each once."""
    classes = (*map(type, modules), *_CACHES)
    return list(dict.fromkeys(c for each in classes for c in each.__mro__ if c is not object))


def namespaces_of(classes: Iterable[type]) -> list[ModuleType]:
    """Files whose functions these classes call by name: transformers' modeling files, those of masks, attention and
    caches, and torch.nn.functional, where other packages install their attention kernels."""
    files = [sys.modules[c.__module__] for c in classes if c.__module__.startswith("transformers.models.")]
    attention = [
        sys.modules[f.__module__] for f in (ALL_ATTENTION_FUNCTIONS["sdpa"],) if f.__module__ in sys.modules
    ]
    return list(dict.fromkeys([*files, masking_utils, cache_utils, *attention, torch.nn.functional]))


def foreign_code(model: PreTrainedModel, classes: Iterable[type]) -> Refusal | None:
    """A function of these classes, of the files they call, or of attention, that was replaced by foreign code."""
    for owner in classes:
        if _top(owner.__module__) not in _TRUSTED:
            continue  # entirely foreign: `replaced_module` decides
        for name, value in list(vars(owner).items()):
            if _is_foreign(called_by(value)):
                return _patched(f"{owner.__qualname__}.{name}", called_by(value))
    for file in namespaces_of(classes):
        for name, value in list(vars(file).items()):
            if not name.startswith("__") and _is_foreign(value):
                return _patched(f"{file.__name__}.{name}", value)
    functions = functions_of(classes, namespaces_of(classes))
    for torchs, name in called_of_torch(functions):
        if _is_foreign(called_by(vars(torchs)[name])):
            return _patched(f"{torchs.__name__}.{name}", called_by(vars(torchs)[name]))
    for function in functions:
        if _has_foreign_code(function):
            written_in = function.__code__.co_filename
            return Refusal(
                "patched_module",
                f"the code of {function.__qualname__} was replaced by code from {written_in}",
            )
    implementation = model.config._attn_implementation
    for kind, functions in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        function = functions.get(implementation)
        if function is not None and _is_foreign(function):
            return _patched(f"the {kind} {implementation!r}", function)
    return None


def replaced_module(name: str, module: nn.Module, implied: ReferenceModule) -> Refusal | None:
    """Why this module differs from the implied one: another class, or methods or modules of its own."""
    if not _behaves_like(type(module), implied.module_class):
        return Refusal(
            "patched_module",
            f"{name or 'the decoder'} is a {_class_name(type(module))} where its config implies "
            f"{_class_name(implied.module_class)}",
        )
    if module._modules.keys() != implied.children:
        changed = sorted(module._modules.keys() ^ implied.children)
        return Refusal(
            "patched_module", f"{name or 'the decoder'}: {', '.join(changed)} was added or removed"
        )
    return replaced_method(name, module)


def replaced_model(model: PreTrainedModel, reference: Reference) -> Refusal | None:
    """Why the model around the decoder differs: its other modules see what the decoder has computed."""
    if not _behaves_like(type(model), reference.model_class):
        return Refusal(
            "patched_module",
            f"the model is a {_class_name(type(model))} where its config implies "
            f"{_class_name(reference.model_class)}",
        )
    return replaced_method("the model", model)


def replaced_method(name: str, module: nn.Module) -> Refusal | None:
    """A method that was set on the module object. Compiled methods, and those that only move inputs, are allowed."""
    for key, value in list(vars(module).items()):
        replaces = callable(value) and hasattr(type(module), key) and key not in _MOVE_THE_MODEL
        if replaces and not _does_the_same(module, key, value):
            return _patched(f"{key} of {name or 'the decoder'}", value)
    return None


def _does_the_same(module: nn.Module, key: str, value: Any) -> bool:
    if key == "_compiled_call_impl":
        key = "_call_impl"
    original = getattr(value, "_torchdynamo_orig_callable", None)
    if original is None and key == "forward":
        hook = vars(module).get("_hf_hook")
        if hook is not None and _only_moves(hook):
            original = vars(module).get("_old_forward")
    return (
        isinstance(original, MethodType)
        and original.__self__ is module
        and original.__func__ is getattr(type(module), key)
    )


def _only_moves(hook: Any) -> bool:
    if type(hook).__module__ != "accelerate.hooks":
        return False
    if type(hook).__name__ == "SequentialHook":
        return all(map(_only_moves, hook.hooks))
    return type(hook).__name__ in _ONLY_MOVE


def _behaves_like(actual: type, implied: type) -> bool:
    """Whether `actual` is the implied class, or a subclass that adds to it and replaces nothing."""
    if actual is implied:
        return _top(implied.__module__) in _TRUSTED
    if not issubclass(actual, implied):
        return False
    return not any(
        isinstance(called_by(value), FunctionType) and hasattr(implied, name) and name != "__init__"
        for between in actual.__mro__[: actual.__mro__.index(implied)]
        for name, value in vars(between).items()
    )


def _is_foreign(value: Any) -> bool:
    """Whether a function or other callable is from outside the trusted packages. Looks below decorators."""
    return any(_top(origin) not in _TRUSTED for origin in _origins(value))


def _has_foreign_code(function: FunctionType) -> bool:
    """Whether the code comes from another file than the function itself (`function.__code__ = other.__code__`)."""
    own, code = function.__globals__.get("__file__"), function.__code__.co_filename
    return own is not None and not code.startswith("<frozen") and _stem(code) != _stem(own)


def _stem(path: str) -> str:
    # `pathlib` takes ten times as long, and a model has 600 functions.
    return os.path.splitext(os.path.basename(path))[0]  # noqa: PTH119, PTH122


def _origins(value: Any) -> Iterator[str]:
    while value is not None:
        if isinstance(value, FunctionType):
            yield str(value.__globals__.get("__name__"))
        elif callable(value) and not isinstance(value, type):
            # Compiled functions have a builtin class; the origin of other objects is that of their class.
            yield type(value).__module__
        value = getattr(value, "__wrapped__", None) if callable(value) else None


def _top(module_name: str) -> str:
    return module_name.partition(".")[0]


def _class_name(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def _patched(what: str, by: Any) -> Refusal:
    name = getattr(by, "__qualname__", type(by).__qualname__)
    return Refusal("patched_module", f"{what} was replaced by {getattr(by, '__module__', '?')}.{name}")
