"""Runs a loaded model over the canary's probe."""

import torch
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.cache import empty_cache
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.reuse.capture import KeyCapture
from kvstore_codec.canary.compare import ProbeKV, tolerance
from kvstore_codec.canary.probe import NEAR_TOKENS, TOKENS, Probe, Sample
from kvstore_codec.errors import CanaryError
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import rotate_

_ROTATION = 4
"""Tolerance of the first layer, as a multiple of what two workers may differ by: compiled models round sines and
cosines differently."""


def probe_for(model: PreTrainedModel) -> Probe:
    """The one probe for this model: all its token ids are within the embedding."""
    config = model.config.get_text_config()
    embedded = int(model.get_input_embeddings().weight.shape[0])
    return Probe.reaching(min(int(config.vocab_size), embedded), int(config.max_position_embeddings))


@torch.inference_mode()
def run_probe(model: PreTrainedModel, spec: ModelSpec, probe: Probe) -> ProbeKV:
    """The model's KV of the probe, captured as for storing: all tokens but the last in one forward pass, then the last
    one alone, as in generation. Needs the hooks of `install_hooks`.

    May run while other threads use the model: hooks, cache and grad mode are per thread. Raises CanaryError when keys
    rotated on restore differ from the model's own keys, and whatever the model raises.
    """
    capture = KeyCapture(spec.layers, 0)
    cache = empty_cache(capture, spec.layers)
    tokens, positions = (
        torch.from_numpy(row)[None].to(model.device) for row in (probe.token_ids(), probe.positions())
    )
    with capture.active():
        for part in (slice(TOKENS - 1), slice(TOKENS - 1, TOKENS)):
            model(
                tokens[:, part],
                position_ids=positions[:, part],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    if not capture.reaches(TOKENS):
        raise CanaryError(f"the keys of {spec.model_id} cannot be seen before RoPE")
    _require_same_rotation(model, spec, capture, [layer.keys[0] for layer in cache.layers])
    sample = Sample.of(spec)
    chosen = torch.tensor(sample.tokens, dtype=torch.int64, device="cpu")
    keys = [capture.keys(layer, 0, TOKENS).cpu()[:, chosen] for layer in sample.layers]
    values = [cache.layers[layer].values[0].cpu()[:, chosen] for layer in sample.layers]
    return ProbeKV(torch.stack(keys), torch.stack(values))


def _require_same_rotation(
    model: PreTrainedModel, spec: ModelSpec, capture: KeyCapture, cached: list[torch.Tensor]
) -> None:
    """`cached` are the keys of each layer as the model rotated them, `[kv_heads, tokens, head_dim]`."""
    tables = rotary_tables(model, NEAR_TOKENS, spec.dtype.torch, model.device)
    most = _ROTATION * tolerance(spec.dtype, 0)
    for layer, table in enumerate(tables):
        turned = capture.keys(layer, 0, NEAR_TOKENS).clone()
        rotate_(turned, table)
        own = cached[layer][:, :NEAR_TOKENS].double()
        off = float((turned.double() - own).square().mean().sqrt() / own.square().mean().sqrt())
        if not off <= most:
            raise CanaryError(
                f"keys of layer {layer} of {spec.model_id} as they are rotated on restore differ from the model's own "
                f"by {off:.2g} of their size, where rounding makes at most {most:.2g}"
            )
