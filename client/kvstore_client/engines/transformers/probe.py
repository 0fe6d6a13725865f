"""Running a loaded model over the canary's probe."""

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
"""Times what two workers may differ by in the first layer: a compiled model rounds sines and cosines otherwise."""


def probe_for(model: PreTrainedModel) -> Probe:
    """The only probe that this model is run over: none of its token ids is beyond the embedding."""
    config = model.config.get_text_config()
    embedded = int(model.get_input_embeddings().weight.shape[0])
    return Probe.reaching(min(int(config.vocab_size), embedded), int(config.max_position_embeddings))


@torch.inference_mode()
def run_probe(model: PreTrainedModel, spec: ModelSpec, probe: Probe) -> ProbeKV:
    """What this model makes of the probe, taken as it is taken to be stored: all but the last token in one forward
    pass, and the last one alone behind them, as an answer is generated. Needs the hooks of `install_hooks`.

    Uses the model beside other calls of it: hooks, cache and grad mode are this thread's own. Raises CanaryError where
    keys as they are turned on restore are not the model's own, besides whatever the model raises.
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
    """`cached`: keys of each layer as the model turned them, `[kv_heads, tokens, head_dim]`."""
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
