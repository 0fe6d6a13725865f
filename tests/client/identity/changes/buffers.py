"""Changes of buffers: RoPE frequencies and embedding scales."""

import random

from transformers import PreTrainedModel

from tests.client.identity.changes.base import change, frequencies


@change("apart")
def scaled_frequencies(model: PreTrainedModel, draw: random.Random) -> None:
    getattr(model.model.rotary_emb, frequencies(model, draw)).mul_(draw.uniform(1.3, 3))


@change("apart")
def one_frequency_written_past_autograd(model: PreTrainedModel, draw: random.Random) -> None:
    getattr(model.model.rotary_emb, frequencies(model, draw)).data[1] *= 3


@change("apart")
def replaced_frequencies(model: PreTrainedModel, draw: random.Random) -> None:
    name = frequencies(model, draw)
    setattr(model.model.rotary_emb, name, getattr(model.model.rotary_emb, name) * draw.uniform(1.3, 3))


@change("apart", "gemma3")
def another_embedding_scale(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.embed_tokens.embed_scale.fill_(draw.uniform(2, 5))


@change("apart", "llama", "qwen2", "qwen3")
def scaled_rope(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@change("model_changed", "llama", "qwen2", "qwen3")
def rope_that_depends_on_the_length(model: PreTrainedModel, draw: random.Random) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@change("changed_setting", "llama", "qwen2", "qwen3")
def rope_of_another_type_than_the_config(model: PreTrainedModel, draw: random.Random) -> None:
    model.model.rotary_emb.rope_type = "linear"
