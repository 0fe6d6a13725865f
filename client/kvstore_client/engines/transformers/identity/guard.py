"""What a model is, before and after each call."""

import logging
import threading
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.identity.state import ModelState
from kvstore_client.engines.transformers.spec import Description, cannot_describe, describe
from kvstore_client.fork import renew_in_children
from kvstore_client.reuse.identity import Refusal
from kvstore_codec.errors import CodecError
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Described:
    """A model at one time. Equal ones make interchangeable KV."""

    spec: ModelSpec
    """What names its chunks."""
    refusal: Refusal | None
    """Why its KV must be neither read nor stored, if so."""
    _state: ModelState | None = field(compare=False, repr=False)
    """None for a model that cannot be looked at."""
    _hooks_made: int = field(compare=False, repr=False)

    def still_holds(self) -> bool:
        """Whether the model has not changed since, nor had another hook for a while. About 1 ms for 30 layers."""
        unhooked = self._hooks_made == _hooks_made()
        return unhooked and self._state is not None and self._state.is_current()

    def rows_hold(self) -> bool:
        """Whether a value of every row of the model's weights is what it was: about 2 ms for 30 small layers."""
        return self._state is not None and self._state.rows_are_current()


class ModelIdentity:
    """Names what `model` computes, and notices when that changes. Thread-safe.

    Raises UnsupportedModelError for a model whose KV cannot be described.
    """

    def __init__(self, model: PreTrainedModel, model_id: str | None = None) -> None:
        self._model, self._model_id = model, model_id
        self._lock = threading.Lock()
        self._state: ModelState | None = None
        self._refusal: Refusal | None = None
        self._description = self._look()
        self._note(self._description.refusal)
        renew_in_children(self, ModelIdentity._renew_after_fork)

    @property
    def spec(self) -> ModelSpec:
        """Of the model as it was last looked at."""
        return self._description.spec

    def current(self, token_ids: torch.Tensor | None = None, *, every_row: bool = False) -> Described:
        """Look at the model, and closely at the embeddings of these tokens, or at a value of every row of its weights
        (2 ms more): about 1 ms for 30 layers, 10 ms after a change, and a second per 2 GB when weights have changed
        (another dtype, a merged adapter, a training step)."""
        with self._lock:
            hooks_made = _hooks_made()
            if every_row and self._state is not None:
                self._state.rows_are_current()  # if not, the look says so
            if self._state is None or not self._state.is_current(token_ids):
                self._renew()
            return Described(self.spec, self._refusal, self._state, hooks_made)

    def _renew_after_fork(self) -> None:
        """In a child. A thread of the parent that held the lock may have been in the middle of a look."""
        if self._lock.locked():
            self._state = None
        self._lock = threading.Lock()

    def _renew(self) -> None:
        try:
            self._description = self._look(self._description)
            self._note(self._description.refusal)
        except CodecError as error:
            # Whatever was hashed belongs to other weights; the next look must not take it for these.
            self._description = Description(self.spec, None, self._description.reference, weights_known=False)
            self._note(Refusal("model_changed", str(error)))

    def _look(self, known: Description | None = None) -> Description:
        """Raises UnsupportedModelError, whatever goes wrong."""
        before, self._state = self._state, None
        try:
            state = self._state = ModelState(self._model)
            same_weights = before is not None and state.tensors.same_as(before.tensors)
            description = describe(self._model, self._model_id, known, same_weights=same_weights)
            state.watch_settings(self._model, description.reference)
        except CodecError:
            raise
        except Exception as error:
            raise cannot_describe(self._model, error) from error
        return description

    def _note(self, refusal: Refusal | None) -> None:
        if refusal is not None and refusal != self._refusal:
            log.warning("%s: KV is neither reused nor stored: %s", self.spec.model_id, refusal.detail)
        elif refusal is None and self._refusal is not None:
            log.info("%s: KV is reused and stored again", self.spec.model_id)
        self._refusal = refusal


def _hooks_made() -> int:
    """How many hooks were ever registered in this process."""
    return int(RemovableHandle.next_id)
