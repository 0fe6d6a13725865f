"""Detects forward hooks that may change what a model computes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from kvstore_client.engines.transformers.identity.modules import uncompiled_name
from kvstore_client.reuse.identity import Refusal

_ONLY_LOOK = ("transformers.utils.output_capturing", "kvstore_client.engines.transformers.capture")
"""Modules whose hooks return nothing and write nothing: transformers leaves some behind after a request for hidden
states, and this package's hooks capture keys before RoPE."""

_ASKS_FOR_GRADIENTS = (
    "transformers.modeling_utils",
    "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads",
)
"""The hook of `enable_input_require_grads` and `gradient_checkpointing_enable`, which changes no value."""

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")


def global_hooks() -> list[Mapping[int, Callable[..., Any]]]:
    """Hooks that torch runs for every module of the process."""
    return [getattr(torch_module, name) for name in _GLOBAL]


def foreign_hook(modules: Iterable[tuple[str, nn.Module]]) -> Refusal | None:
    """The first hook on one of these modules, or on all, that is not known to be read-only."""
    for hooks in global_hooks():
        for hook in list(hooks.values()):
            return Refusal(
                "global_hook", f"the global module hook {_described(hook)} may change what it computes"
            )
    for name, module in modules:
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            written_in, name_there = (getattr(hook, key, None) for key in ("__module__", "__qualname__"))
            if written_in not in _ONLY_LOOK and (written_in, name_there) != _ASKS_FOR_GRADIENTS:
                where = uncompiled_name(name) or "the model"
                return Refusal(
                    "forward_hook", f"the hook {_described(hook)} on {where} may change what it computes"
                )
    return None


def _described(hook: object) -> str:
    return f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"
