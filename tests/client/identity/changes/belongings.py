"""Objects that users keep on a model, which change nothing that it computes."""

import random
import threading

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.client.identity.changes.base import change, layer


@change("same")
def arrays_of_statistics(model: PreTrainedModel, draw: random.Random) -> None:
    model.statistics = {"means": np.arange(3)}


@change("same")
def a_lock_in_a_list(model: PreTrainedModel, draw: random.Random) -> None:
    layer(model, draw).extra = [threading.Lock()]
    model.extra = [threading.Lock()]


@change("same")
def a_counter_of_calls(model: PreTrainedModel, draw: random.Random) -> None:
    model.calls, model.counts = 0, {"calls": 0}

    def count(*_: object) -> None:
        model.calls += 1
        model.counts["calls"] += 1

    model.lm_head.register_forward_hook(count)


@change("same")
def captured_activations(model: PreTrainedModel, draw: random.Random) -> None:
    model.saved = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: model.saved.append(inputs[0]))
    model(torch.tensor([[1, 2, 3]]))  # these ask for gradients


@change("same")
def tensors_in_a_list(model: PreTrainedModel, draw: random.Random) -> None:
    model.saved = [torch.ones(3), torch.ones(4)]


@change("model_changed")
def arrays_in_the_config(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.extra = {"means": np.arange(3)}
