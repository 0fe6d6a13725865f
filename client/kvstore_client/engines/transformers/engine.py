"""The transformers implementation of `Engine`, which reuse drives."""

import logging
from functools import partial

import torch
from transformers import PreTrainedModel

from kvstore_client.buffers import KVBuffers
from kvstore_client.engines.transformers.cache import placed_cache
from kvstore_client.engines.transformers.capture import install_hooks
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.identity.guard import Described, ModelIdentity
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.reuse.capture import KeyCapture
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)


class TransformersEngine:
    """A loaded model, with hooks on its key projections until `close`."""

    def __init__(self, model: PreTrainedModel, identity: ModelIdentity) -> None:
        self._model, self._identity = model, identity
        self.embed = partial(embedded, model)
        self.decoder = _decoder_of(model)
        self._hooks = install_hooks(model)
        # MKL's first cosine in a process is off by 2e-4 in some threads when several threads compute it at once (seen
        # in about one start of fifteen), and the model's cosine would be that one. A single position takes only one
        # thread.
        self.rotary(1)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def look(self, tokens: torch.Tensor | None = None) -> Described:
        return self._identity.current(tokens)

    def renew_hooks(self) -> None:
        self.close()
        try:
            self._hooks = install_hooks(self._model)
        except UnsupportedModelError as error:  # nothing can be stored; stored KV may be read
            log.warning("%s", error)

    def rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        return rotary_tables(self._model, tokens, self._identity.spec.dtype.torch, "cpu")

    def compute(self, tokens: torch.Tensor, buffers: KVBuffers, capture: KeyCapture) -> None:
        cache = placed_cache(buffers, capture)
        self._model.get_decoder()(input_ids=tokens[None], past_key_values=cache, use_cache=True)

    def close(self) -> None:
        """Remove the hooks from the model."""
        while self._hooks:
            self._hooks.pop().remove()


def _decoder_of(model: PreTrainedModel) -> Decoder | None:
    try:
        return Decoder(model)
    except UnsupportedModelError as error:
        log.info("%s", error)
        return None
