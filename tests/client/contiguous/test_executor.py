"""Which frames a question over a part of its prefix chooses, layer by layer."""

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.contiguous.executor import SCORED_TOKENS, Reprefill
from kvstore_client.contiguous.scoring import FrameScores
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.rotary import rotary_tables
from tests.client.chunks import SPEC
from tests.client.contiguous.nodes import Prefix
from tests.client.models import random_prompt, tiny_model

MODEL = tiny_model("llama", num_hidden_layers=SPEC.layers)


def test_every_layer_of_a_period_has_a_say() -> None:
    """Layer 0 prefers frame 2, and the other layers of its period frame 5."""
    asked: dict[int, torch.Tensor] = {}

    def scorer(layer: int, queries: torch.Tensor, scale: float) -> FrameScores:
        asked[layer] = queries
        preferred = torch.eye(prefix.grid.frames)[{0: 2, 4: 3, 5: 3}.get(layer, 5)]
        return FrameScores(preferred, preferred)

    prefix, question = Prefix(), random_prompt(SCORED_TOKENS + 20, seed=1)[0]
    shape = (SPEC.layers, SPEC.kv_heads, 3 * 64 + len(question), SPEC.head_dim)
    buffers = KVBuffers(torch.empty(shape), torch.empty(shape), torch.empty(0))
    tokens = prefix.grid.tokens
    rotary = rotary_tables(MODEL, tokens + len(question), torch.float32, "cpu")[0].at(
        slice(tokens, tokens + len(question))
    )
    decoder, loader = Decoder(MODEL), prefix.loader()
    computed = Reprefill(decoder, question, prefix.grid, 3, scorer, loader, buffers, rotary)
    with torch.inference_mode():
        computed.compute()
        expected = decoder.project(0, decoder.embed(question), rotary).queries
    loader.close()
    assert [chosen.frames for chosen in computed.sets] == [[0, 5, 7], [0, 3, 7]]
    assert sorted(asked) == list(range(SPEC.layers))
    torch.testing.assert_close(asked[0], expected[:, -SCORED_TOKENS:])
