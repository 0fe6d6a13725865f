"""Which frames a question over a part of its prefix chooses and reads ahead."""

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


class Asking:
    """A question whose layers prefer certain frames: layer 0 frame 2, the others of its period frame 5, those of the
    second period frame 3."""

    def __init__(self, **options: bool) -> None:
        self.asked: dict[int, list[torch.Tensor]] = {}
        """Queries that each layer was scored by, in order."""
        self.prefix, question = Prefix(), random_prompt(SCORED_TOKENS + 20, seed=1)[0]
        shape = (SPEC.layers, SPEC.kv_heads, 3 * 64 + len(question), SPEC.head_dim)
        buffers = KVBuffers(torch.empty(shape), torch.empty(shape), torch.empty(0))
        tokens = self.prefix.grid.tokens
        rotary = rotary_tables(MODEL, tokens + len(question), torch.float32, "cpu")[0].at(
            slice(tokens, tokens + len(question))
        )
        decoder, loader = Decoder(MODEL), self.prefix.loader(**options)
        self.computed = Reprefill(
            decoder, question, self.prefix.grid, 3, self._score, loader, buffers, rotary
        )
        with torch.inference_mode():
            self.computed.compute()
            self.first = decoder.project(0, decoder.embed(question), rotary).queries
        loader.close()

    def _score(self, layer: int, queries: torch.Tensor, scale: float) -> FrameScores:
        self.asked.setdefault(layer, []).append(queries)
        preferred = torch.eye(self.prefix.grid.frames)[{0: 2, 4: 3, 5: 3}.get(layer, 5)]
        return FrameScores(preferred, preferred)


def test_every_layer_of_a_period_has_a_say() -> None:
    asking = Asking()
    assert [chosen.frames for chosen in asking.computed.sets] == [[0, 5, 7], [0, 3, 7]]
    assert sorted(asking.asked) == list(range(SPEC.layers))
    torch.testing.assert_close(asking.asked[0][0], asking.first[:, -SCORED_TOKENS:])


def test_all_layers_of_the_next_period_say_what_is_read_ahead() -> None:
    """Their queries come from states that have not passed the period before."""
    asking = Asking()
    assert [asking.prefix.asked(number) for number in range(len(asking.prefix.reads))] == [
        [(0, 0), (0, 5), (0, 7)],
        [(1, 0), (1, 3), (1, 7)],
    ]
    assert asking.prefix.report.frames_speculated_right == 3
    assert [len(asking.asked[layer]) for layer in range(SPEC.layers)] == [1] * 4 + [2] * 2
    early, late = asking.asked[4]
    assert early.shape == late.shape
    assert not torch.equal(early, late)


def test_nothing_is_scored_twice_without_reading_ahead() -> None:
    asking = Asking(read_ahead=False)
    assert [len(asking.asked[layer]) for layer in range(SPEC.layers)] == [1] * SPEC.layers
    assert asking.prefix.report.frames_speculated == 0
