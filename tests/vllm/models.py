"""Checkpoints of tiny models with random weights."""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from kvstore_client.engines.vllm.naming import served_spec
from kvstore_codec.model_spec import ModelSpec

HIDDEN_SIZE = 128


def saved_model(folder: Path, seed: int) -> Path:
    """A Llama of four layers and two KV heads for up to 8,192 tokens. Other seeds give other weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=512, bos_token_id=1, eos_token_id=None, pad_token_id=None, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def spec_of(model: Path, cache_dir: Path, dtype: torch.dtype = torch.float32) -> ModelSpec:
    """The ModelSpec that the connector names this checkpoint's KV by."""
    config = AutoConfig.from_pretrained(model)
    named = SimpleNamespace(model=str(model), revision=None, hf_config=config, dtype=dtype)
    return served_spec(named, cache_dir)
