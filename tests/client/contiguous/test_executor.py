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
    """A question whose layers prefer certain frames: layer 3 frame 5 and layer 4 frame 3, and the other scored layer of
    each period another one, but less."""

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
            self.first = decoder.queries(2, decoder.embed(question), rotary)
        loader.close()

    def _score(self, layer: int, queries: torch.Tensor, scale: float) -> FrameScores:
        self.asked.setdefault(layer, []).append(queries)
        frame, share = {2: (2, 0.5), 3: (5, 1.0), 4: (3, 1.0), 5: (2, 0.5)}[layer]
        preferred = share * torch.eye(self.prefix.grid.frames)[frame]
        return FrameScores(preferred, preferred)


def test_the_last_two_layers_of_a_period_have_a_say() -> None:
    asking = Asking()
    assert [chosen.frames for chosen in asking.computed.sets] == [[0, 5, 7], [0, 3, 7]]
    assert sorted(asking.asked) == [2, 3, 4, 5]
    torch.testing.assert_close(asking.asked[2][0], asking.first[:, -SCORED_TOKENS:])


def test_the_scored_layers_of_the_next_period_say_what_is_read_ahead() -> None:
    """Their queries come from states that have not passed the period before."""
    asking = Asking()
    assert [asking.prefix.asked(number) for number in range(len(asking.prefix.reads))] == [
        [(0, 0), (0, 5), (0, 7)],
        [(1, 0), (1, 3), (1, 7)],
    ]
    assert asking.prefix.report.frames_speculated_right == 3
    assert [len(asking.asked[layer]) for layer in (2, 3, 4, 5)] == [1, 1, 2, 2]
    early, late = asking.asked[4]
    assert early.shape == late.shape
    assert not torch.equal(early, late)


def test_nothing_is_scored_twice_without_reading_ahead() -> None:
    asking = Asking(read_ahead=False)
    assert [len(asked) for asked in asking.asked.values()] == [1] * 4
    assert asking.prefix.report.frames_speculated == 0
