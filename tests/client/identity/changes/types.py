"""Changes of dtype."""

import random

import torch
from transformers import PreTrainedModel

from tests.client.identity.changes.base import change, norm


@change("apart")
def cast_to_bfloat16(model: PreTrainedModel, draw: random.Random) -> None:
    model.to(torch.bfloat16)


@change("apart")
def cast_there_and_back(model: PreTrainedModel, draw: random.Random) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@change("apart")
def frequencies_cast_there_and_back(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.to(torch.bfloat16).to(torch.float32)


@change("apart")
def a_norm_in_bfloat16(model: PreTrainedModel, draw: random.Random) -> None:
    norm(model, draw).to(torch.bfloat16)
