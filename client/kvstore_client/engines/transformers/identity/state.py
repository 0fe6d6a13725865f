"""Detects cheaply that a model has changed."""

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore_client.engines.transformers.identity.calls import called_of_torch, functions_of
from kvstore_client.engines.transformers.identity.code import classes_of, namespaces_of
from kvstore_client.engines.transformers.identity.hooks import global_hooks
from kvstore_client.engines.transformers.identity.modules import named_modules, uncompiled_name
from kvstore_client.engines.transformers.identity.precision import float32_matmul_precision
from kvstore_client.engines.transformers.identity.reference import Reference
from kvstore_client.engines.transformers.identity.rows import (
    COMPARED_WHOLE,
    Strided,
    WeightRows,
    reach_of,
    read,
    strided,
)

_CODE = operator.attrgetter("__code__")

_SAMPLES = 4
"""Values of each parameter that every check compares."""


class TensorState:
    """Addresses and version counters of a model's parameters and buffers, and samples of their values.

    Writes past autograd (`parameter.data += delta`, as when an adapter is merged) do not change version counters. Each
    check therefore compares a few values of every tensor, the embeddings of the given tokens, and some rows in turn.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        named = [(uncompiled_name(n), t) for n, t in model.state_dict(keep_vars=True).items()]
        self._named = [(name, id(tensor)) for name, tensor in named]
        buffers = {id(b) for b in model.buffers()}
        found = {id(t): t for t in (*(t for _, t in named), *model.buffers()) if isinstance(t, torch.Tensor)}
        self._tensors = [t for t in found.values() if _has_storage(t)]
        self._others = [t for t in found.values() if not _has_storage(t)]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        samples: dict[torch.device, list[Strided]] = {}
        for tensor in self._tensors:
            if tensor.numel():
                reach = reach_of(tensor)
                whole = id(tensor) in buffers and reach <= COMPARED_WHOLE
                count = reach if whole else min(reach, _SAMPLES)
                samples.setdefault(tensor.device, []).append(strided(tensor, count, max(1, reach // count)))
        self._samples = list(samples.values())
        self._marks = self._look()
        self._values = list(map(read, self._samples))
        embedding = getattr(model.get_input_embeddings(), "weight", None)
        self.rows = WeightRows(self._tensors, next((t for t in self._tensors if t is embedding), None))

    def is_current(self, token_ids: torch.Tensor | None = None) -> bool:
        """Whether nothing has changed. Raises RuntimeError when tensors became smaller."""
        return (
            self._marks == self._look()
            and all(map(torch.equal, self._values, map(read, self._samples)))
            and self.rows.next_are_current()
            and (token_ids is None or self.rows.embed_alike(token_ids))
        )

    def same_as(self, other: "TensorState") -> bool:
        """Whether both describe the same tensors under the same names."""
        return (
            self._named == other._named
            and len(self._tensors) == len(other._tensors)
            and all(map(operator.is_, self._tensors, other._tensors))
            and not self._others
            and self._marks == other._marks
            and all(map(torch.equal, self._values, other._values))
            and self.rows.same_as(other.rows)
        )

    def _look(self) -> list[object]:
        return [
            *[tensor.data_ptr() for tensor in self._tensors],
            *[tensor.dtype for tensor in self._tensors],
            *[tensor._version for tensor in self._versioned],
        ]


class ModelState:
    """Every part of a model in which a change would show: its modules, their classes, attributes, hooks and tensors,
    the code that they run, and the config. Keeps references, so that a new object cannot be mistaken for a deleted one.

    User data on the model object, such as counters or captured activations, is not part of it. Errors during the first
    inspection are raised.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = modules = list(model.modules())
        self._sources: list[Callable[[], Iterable[object]]] = []
        containers: list[Any] = []
        for module in modules:
            attributes = vars(module)
            own = attributes.values if module is not model else partial(_effective, attributes)
            self._sources += [
                own, module._parameters.values, module._buffers.values, module._modules.values,
                module._forward_hooks.values, module._forward_pre_hooks.values,
            ]  # fmt: skip
            containers.append(module._non_persistent_buffers_set)
        classes = classes_of(modules)
        configs = {id(c): c for m in modules for c in vars(m).values() if isinstance(c, PreTrainedConfig)}
        for config in configs.values():
            self._sources.append(vars(config).values)
            containers += [value for value in vars(config).values() if _is_container(value)]
        self._sources += [vars(owner).values for owner in classes]
        files = namespaces_of(classes)
        self._sources += [vars(file).values for file in files]
        self._functions = functions_of(classes, files)
        of_torch = [name for owner, name in called_of_torch(self._functions) if owner is torch]
        self._sources += [partial(operator.itemgetter(*of_torch), vars(torch)), vars(torch.Tensor).values]
        self._sources += [hooks.values for hooks in global_hooks()]
        self._sources += [ALL_ATTENTION_FUNCTIONS.values, ALL_MASK_ATTENTION_FUNCTIONS.values]
        self._objects = self._look()
        self._containers, self._contents = containers, copy.deepcopy(containers)
        if self._containers != self._contents:  # raises for arrays, which cannot be compared later
            raise ValueError("its config holds values that do not equal their own copies")
        self._precision = float32_matmul_precision()
        self.tensors = TensorState(model)

    def watch_settings(self, model: PreTrainedModel, reference: Reference) -> None:
        """Also detect changes inside lists, dicts and sets among the module settings from now on."""
        for name, module in named_modules(model.get_decoder()):
            implied = reference.modules.get(name)
            for key in implied.settings if implied is not None else ():
                value = vars(module).get(key)
                if _is_container(value):
                    self._containers.append(value)
                    self._contents.append(copy.deepcopy(value))

    def rows_are_current(self) -> bool:
        """Whether one value of every row of the weights is unchanged. False means a lasting change. Never raises."""
        try:
            return self.tensors.rows.are_current()
        except Exception:  # tensors became smaller
            return False

    def is_current(self, token_ids: torch.Tensor | None = None) -> bool:
        """Whether nothing has changed, as far as a quick check shows, including the embeddings of these tokens. About 1
        ms for 30 layers. May be called from any thread, and never raises."""
        try:
            now = self._look()
            return (
                len(now) == len(self._objects)
                and all(map(operator.is_, now, self._objects))
                and self._containers == self._contents
                and self._precision == float32_matmul_precision()
                and self.tensors.is_current(token_ids)
            )
        except Exception:  # changed during the check, or not comparable any more
            return False

    def _look(self) -> list[object]:
        return [
            *map(type, self._modules),
            *map(_CODE, self._functions),
            *itertools.chain.from_iterable(source() for source in self._sources),
        ]


def _effective(attributes: Mapping[str, object]) -> list[object]:
    """The model's own attributes that may affect its computation. Its modules are inspected separately."""
    return [
        value
        for name, value in attributes.items()
        if name.startswith("_") or callable(value) or isinstance(value, PreTrainedConfig)
    ]


def _is_container(value: object) -> bool:
    return isinstance(value, dict | list | set)


def _has_storage(tensor: torch.Tensor) -> bool:
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
