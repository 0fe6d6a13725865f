"""What reuse has to know of a model: which it is, whether it stays so, and whether it computes the cluster's KV."""

import os
from dataclasses import dataclass, field
from typing import Protocol

from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model's KV must be neither read nor stored."""

    reason: str
    """One word for metrics and reports, such as `forward_hook`."""
    detail: str
    """A sentence for the log: which module or function it is, and what to do."""


class DescribedModel(Protocol):
    """A model at one time. Equal ones make interchangeable KV."""

    @property
    def spec(self) -> ModelSpec:
        """Names the model's chunks."""
        ...

    @property
    def refusal(self) -> Refusal | None:
        """Why its KV must be neither read nor stored, if so."""
        ...

    def still_holds(self) -> bool:
        """Whether the model has not changed since. Asked before anything is stored."""
        ...

    def rows_hold(self) -> bool:
        """A closer look at the weights, asked when there is something to store."""
        ...


class CanaryCheck(Protocol):
    """Whether a model computes what the cluster's KV of it was computed with. Thread-safe."""

    def watch(self, spec: ModelSpec) -> None:
        """The model is this one from now on: start to compare it."""
        ...

    def refusal(self, spec: ModelSpec, *, wait_s: float) -> str | None:
        """Why KV must be neither reused nor stored now, in one word; None when it may be. Waits for a comparison under
        way for `wait_s` at most."""
        ...

    def why(self, reason: str) -> str:
        """A refusal's word and sentence."""
        ...

    def count(self, reason: str, *, storing: bool = False) -> str:
        """Count, and log, that a call looks nothing up for `reason`, or does not store what it computed. Returns
        `why`."""
        ...


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """The model that a call began with: the call's chunks are named by it."""

    model: DescribedModel
    generation: int
    """Of the model's canary: chunks are named with it."""
    compared: bool = True
    """Whether the model had been compared with its canary. Otherwise nothing was looked up."""
    process: int = field(default_factory=os.getpid)
    """Process whose threads fetch for the call."""

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def is_still(self, model: DescribedModel, generation: int) -> bool:
        """Whether what was fetched for it serves `model`, in this process."""
        return self.model == model and self.generation == generation and self.process == os.getpid()
