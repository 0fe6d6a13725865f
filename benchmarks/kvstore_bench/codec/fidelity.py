"""Compares a model's predictions of a passage's continuation after decoded KV with those after exact KV."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_bench.codec.texts import Excerpt
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.engines.transformers.features import embedded
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, chunk_ids
from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True)
class Passage:
    """A passage with the exact KV of its context, as a worker stores it: keys before RoPE."""

    spec: ModelSpec
    excerpt: Excerpt
    keys: torch.Tensor
    """in the model's dtype, [layers, kv_heads, tokens, head_dim]"""
    values: torch.Tensor
    embeddings: torch.Tensor
    """input embeddings of the tokens, [tokens, hidden]"""
    reference: torch.Tensor
    """log-probabilities after exact KV, f32 [continuation, vocabulary]"""

    @property
    def kv_values(self) -> int:
        """Number of values in K and V together."""
        return 2 * self.keys.numel()

    def chunk_ids(self) -> list[ChunkId]:
        return chunk_ids(self.spec.digest, b"", self.excerpt.context, CHUNK_TOKENS)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Fidelity of decoded KV."""

    kl: float
    """KL divergence from the prediction after exact KV, nats per token, mean over the continuation"""
    top1: float
    """share of tokens with the same most likely successor"""
    nll: float
    """negative log-likelihood of the text, nats per token"""


def observe(observed: ObservedModel, excerpt: Excerpt) -> Passage:
    dtype = observed.spec.dtype.torch
    seen = observed.prefill(excerpt.context)
    keys, values = seen.keys.to(dtype), seen.values.to(dtype)
    return Passage(
        observed.spec,
        excerpt,
        keys,
        values,
        embedded(observed.model, excerpt.context),
        observed.log_probabilities(keys.float(), values.float(), excerpt.continuation),
    )


def judge(observed: ObservedModel, passage: Passage, keys: torch.Tensor, values: torch.Tensor) -> Fidelity:
    """Fidelity of decoded `keys` (before RoPE) and `values` of the passage, in any float dtype."""
    exact, continuation = passage.reference, passage.excerpt.continuation
    said = observed.log_probabilities(keys.float(), values.float(), continuation)
    return Fidelity(
        float((exact.exp() * (exact - said)).sum(-1).mean()),
        float((said.argmax(-1) == exact.argmax(-1)).float().mean()),
        float(torch.nn.functional.nll_loss(said[:-1], continuation[1:])),
    )


def perplexity(judged: Sequence[Fidelity]) -> float:
    return math.exp(sum(fidelity.nll for fidelity in judged) / len(judged))
