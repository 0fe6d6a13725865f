"""Interface of a model's identity: its spec, whether it is unchanged, and whether it matches the cluster's canary."""

import os
from dataclasses import dataclass, field
from typing import Protocol

from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model's KV must not be read or stored."""

    reason: str
    """One word for metrics and reports, such as `forward_hook`."""
    detail: str
    """A sentence for the log: the module or function at fault, and what to do."""


class DescribedModel(Protocol):
    """A model at one time. Models that compare equal compute interchangeable KV."""

    @property
    def spec(self) -> ModelSpec:
        """Names the model's chunks."""
        ...

    @property
    def refusal(self) -> Refusal | None:
        """Why its KV must not be read or stored; None when it may be."""
        ...

    def still_holds(self) -> bool:
        """Whether the model is unchanged. Asked before anything is stored."""
        ...

    def rows_hold(self) -> bool:
        """Whether the weights are unchanged on a closer look. Asked when there is something to store."""
        ...


class CanaryCheck(Protocol):
    """Whether a model computes the same KV as its canary in the cluster. Thread-safe."""

    def watch(self, spec: ModelSpec) -> None:
        """Set the model's spec and start to compare."""
        ...

    def refusal(self, spec: ModelSpec, *, wait_s: float) -> str | None:
        """Why KV must not be reused or stored now, in one word; None when it may be. Waits up to `wait_s` for a
        comparison in progress."""
        ...

    def why(self, reason: str) -> str:
        """The refusal's one-word reason followed by a sentence."""
        ...

    def count_refusal(self, reason: str, *, storing: bool = False) -> str:
        """Count and log that a call, for `reason`, looks nothing up, or with `storing` stores nothing. Return
        `why`."""
        ...


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """The model at the start of a call; it names the call's chunks."""

    model: DescribedModel
    generation: int
    """Generation of the model's canary, which is part of the chunks' names."""
    compared: bool = True
    """Whether the model had been compared with its canary. Otherwise nothing was looked up."""
    process: int = field(default_factory=os.getpid)
    """Id of the process whose threads fetch for the call."""

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def is_still(self, model: DescribedModel, generation: int) -> bool:
        """Whether KV fetched for this snapshot may be used by `model`, in this process."""
        return self.model == model and self.generation == generation and self.process == os.getpid()
