"""Which frames a question over a part of its prefix chooses, and when they are requested."""

from collections.abc import Sequence

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.contiguous.executor import SCORED_TOKENS, Reprefill
from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.contiguous.scoring import FrameScores
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.reuse.engine import Projected
from kvstore_codec.rope import RotaryTable
from tests.client.chunks import SPEC
from tests.client.contiguous.nodes import Prefix
from tests.client.models import random_prompt, tiny_model

MODEL = tiny_model("llama", num_hidden_layers=SPEC.layers)


class Watched(Decoder):
    """Remembers the states that enter each layer."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.entering: dict[int, torch.Tensor] = {}

    def project(self, layer: int, hidden: torch.Tensor, rotary: RotaryTable) -> Projected:
        self.entering[layer] = hidden
        return super().project(layer, hidden, rotary)


class Asking:
    """A question whose layers prefer certain frames: layer 3 frame 5 and layer 4 frame 3, and the other scored layer of
    each period another one, but less."""

    def __init__(self, **options: bool) -> None:
        self.asked: dict[int, list[torch.Tensor]] = {}
        """Queries that each layer was scored by, in order."""
        self.requested: list[tuple[int, int]] = []
        """Each period that was requested, and the number of layers that were begun by then."""
        self.prefix, question = Prefix(), random_prompt(SCORED_TOKENS + 20, seed=1)[0]
        shape = (SPEC.layers, SPEC.kv_heads, 3 * 64 + len(question), SPEC.head_dim)
        buffers = KVBuffers(torch.empty(shape), torch.empty(shape), torch.empty(0))
        tokens = self.prefix.grid.tokens
        rotary = rotary_tables(MODEL, tokens + len(question), torch.float32, "cpu")[0].at(
            slice(tokens, tokens + len(question))
        )
        self.decoder, loader = Watched(), self.prefix.loader()
        self.computed = Reprefill(
            self.decoder, question, self.prefix.grid, 3, self._score, self._watched(loader), buffers, rotary,
            **options,
        )  # fmt: skip
        asking = slice(20, None)
        with torch.inference_mode():
            self.computed.compute()
            self.queries = {
                (layer, of): self.decoder.queries(layer, states[:, asking], rotary.at(asking))
                for layer in range(SPEC.layers)
                for of, states in self.decoder.entering.items()
            }
            """Of each layer, from the states that enter each layer."""
        loader.close()

    def _watched(self, loader: FrameLoader) -> FrameLoader:
        begin = loader.begin

        def watched(period: int, chosen: Sequence[int]) -> None:
            self.requested.append((period, len(self.decoder.entering)))
            begin(period, chosen)

        loader.begin = watched  # type: ignore[method-assign,assignment]
        return loader

    def _score(self, layer: int, queries: torch.Tensor, scale: float) -> FrameScores:
        self.asked.setdefault(layer, []).append(queries)
        frame, share = {2: (2, 0.5), 3: (5, 1.0), 4: (3, 1.0), 5: (2, 0.5)}[layer]
        preferred = share * torch.eye(self.prefix.grid.frames)[frame]
        return FrameScores(preferred, preferred)


def test_the_last_two_layers_of_a_period_have_a_say() -> None:
    asking = Asking()
    assert [chosen.frames for chosen in asking.computed.sets] == [[0, 5, 7], [0, 3, 7]]
    assert {layer: len(queries) for layer, queries in asking.asked.items()} == {2: 1, 3: 1, 4: 1, 5: 1}
    torch.testing.assert_close(asking.asked[2][0], asking.queries[2, 0])


def test_a_set_that_is_read_ahead_is_requested_before_the_last_layer() -> None:
    """So it is read while that layer is computed. The states that enter the layer choose it."""
    asking = Asking(read_ahead=True)
    assert next(begun for period, begun in asking.requested if period == 1) == 3
    assert [len(queries) for queries in asking.asked.values()] == [1] * 4
    for layer in (4, 5):
        torch.testing.assert_close(asking.asked[layer][0], asking.queries[layer, 3])


def test_without_reading_ahead_a_period_is_chosen_when_it_begins() -> None:
    asking = Asking()
    assert next(begun for period, begun in asking.requested if period == 1) == 4
    for layer in (4, 5):
        torch.testing.assert_close(asking.asked[layer][0], asking.queries[layer, 4])
