"""Kinds of change that a model can go through after it was wrapped."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel

Undo = Callable[[], object]


class Change(NamedTuple):
    """`apply` may return what takes it off again: then it concerns the whole process, not this model alone."""

    apply: Callable[[PreTrainedModel, random.Random], Undo | None]
    outcome: str
    """`apart`: it has another name. `same`: KV does not depend on it. Else why the call is passed through."""
    families: tuple[str, ...] = ("llama", "qwen2", "qwen3", "gemma3")


CHANGES: dict[str, Change] = {}


def change(outcome: str, *families: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(apply: Callable[..., Any]) -> Callable[..., Any]:
        CHANGES[apply.__name__] = Change(apply, outcome, families or Change._field_defaults["families"])
        return apply

    return add


def layer(model: PreTrainedModel, draw: random.Random) -> Any:
    return draw.choice(list(model.model.layers))


def norm(model: PreTrainedModel, draw: random.Random) -> Any:
    owner = layer(model, draw)
    return draw.choice([owner.input_layernorm, owner.post_attention_layernorm])


def frequencies(model: PreTrainedModel, draw: random.Random) -> str:
    names = model.model.rotary_emb._non_persistent_buffers_set
    return draw.choice(sorted(name for name in names if "original" not in name))


def replaced(owner: Any, name: str, value: object) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)
