"""The model that answers its first step with a state that was computed before, and the layers that compute it."""

import pytest
import torch

from kvstore_client.engines.transformers.decoder import FAMILIES, Decoder
from kvstore_client.engines.transformers.first_step import with_first_step
from tests.client.models import tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_uses_the_layers_that_the_model_generates_with(family: str) -> None:
    model = tiny_model(family)
    assert Decoder(model)._decoder is model.get_decoder()


def test_an_answering_model_leaves_no_trace_on_its_model() -> None:
    model = tiny_model()
    before = dict(vars(model))
    state = torch.zeros(1, 1, model.config.hidden_size)
    first, second = with_first_step(model, state), with_first_step(model, state)
    assert vars(model) == before
    assert vars(first) is vars(model)
    assert type(first) is type(second)  # transformers takes milliseconds for each new class
    assert isinstance(first, type(model))
    assert type(model) is not type(first)
