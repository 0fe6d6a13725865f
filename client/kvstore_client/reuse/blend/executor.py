"""Recomputes some tokens of a prompt, layer by layer, into the KV that is reused for the others."""

from collections.abc import Callable, Sequence

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.recompute import Drift, ReusedChunk, Selector, select
from kvstore_client.recompute.base import positions_of
from kvstore_client.reuse.blend.attention import CausalBlocks
from kvstore_client.reuse.blend.layers import layers_on
from kvstore_client.reuse.engine import DecoderLayers, Projected
from kvstore_client.reuse.rotation import half_turned, turned_back
from kvstore_codec.rope import RotaryTable

SCORED_TOKENS = 128
"""Number of last question tokens whose attention selects the tokens to recompute."""

_Look = Callable[[int, Projected, torch.Tensor], None]
"""Called with a layer's number, its projections of the computed tokens, and all its keys."""


class Blend:
    """One prompt whose reused KV is in `buffers`, or arrives there, with keys rotated to their positions.

    `chunks` are the reused ones, ordered by position; every other token is computed. `question` is the position of the
    question's first token. `arrived(layer)` waits until a layer's reused KV is in the buffers, and raises when it will
    not arrive: the pass ends there. The pass waits only for the layer that it computes, so later layers arrive
    meanwhile. `rotary` holds positions 0 to the prompt's last; `keep` are positions whose keys before RoPE will be
    read.

    Use it in inference mode, from one thread. Implements the `Probe` of selectors.
    """

    def __init__(
        self,
        decoder: DecoderLayers,
        tokens: torch.Tensor,
        chunks: Sequence[ReusedChunk],
        question: int,
        buffers: KVBuffers,
        rotary: RotaryTable,
        arrived: Callable[[int], None],
        keep: Sequence[range] = (),
    ) -> None:
        device = decoder.device
        self._decoder, self._tokens, self._chunks = decoder, tokens.to(device), chunks
        self._question, self._total = question, len(tokens)
        self._layers = layers_on(device, buffers, arrived)
        self._rotary = RotaryTable(rotary.cos.to(device), rotary.sin.to(device))
        self._reused = torch.zeros(self._total, dtype=torch.bool, device=device)
        self._reused[positions_of(chunks).to(device)] = True
        approximate = [chunk for chunk in chunks if not chunk.exact]
        self._lead = approximate[0].tokens.start if approximate else question
        """All KV before this position is final once it is computed, whatever is selected later."""
        self._lead_is_there = False
        self._slots = torch.full((self._total,), -1, dtype=torch.int64, device=device)
        kept = torch.cat([torch.arange(part.start, part.stop, device=device) for part in (*keep, range(0))])
        self._slots[kept] = torch.arange(len(kept), device=device)
        layers, kv_heads, _, head_dim = buffers.keys.shape
        self._kept_keys = torch.empty(
            layers, kv_heads, len(kept), head_dim, dtype=decoder.dtype, device=device
        )

    @property
    def kv(self) -> KVBuffers:
        """The prompt's KV on the model's device."""
        return self._layers.kv

    def choose(self, selector: Selector, ratio: float) -> torch.Tensor:
        """Positions of the reused tokens to recompute, i64, ascending."""
        chosen = select(selector, self._chunks, self._total, ratio, self if selector.needs_kv else None)
        return chosen.to(self._tokens.device)

    def compute(self, selected: torch.Tensor, *, drift: bool, question: bool) -> torch.Tensor:
        """Compute the `selected` tokens and all that are not reused, except the prompt's last. With `drift` the other
        reused tokens move as the selected ones show. With `question` the last token is computed, too, and the hidden
        states that leave the last layer for the question's tokens are returned, `[1, tokens, hidden]`."""
        wanted = ~self._reused
        if self._lead_is_there:
            wanted[: self._lead] = False
        wanted[selected] = True
        wanted[-1] = question
        positions = wanted.nonzero().flatten()
        moving = Drift(self._chunks, selected, positions, self._decoder.dtype) if drift else None
        return self._pass(positions, drift=moving, last_from=self._question if question else self._total)

    def unrotated_keys(self, tokens: range) -> torch.Tensor:
        """Keys of kept positions, `[layers, kv_heads, tokens, head_dim]`."""
        slots = self._slots[tokens.start : tokens.stop]
        return self._kept_keys[:, :, slots]

    def question_attention(self, see: Callable[[torch.Tensor], None], every: int = 1) -> None:
        """See `Probe`. Computes the prompt's beginning for good, and the question over the reused KV; other tokens that
        are still to be computed are hidden from it."""
        before = (~self._reused[: self._lead]).nonzero().flatten()
        question = torch.arange(self._question, self._total, device=before.device)
        positions = torch.cat([before, question])
        hidden = ~self._reused
        hidden[positions] = False
        asked, step = question[-SCORED_TOKENS:], min(every, self._decoder.layers)
        masks: dict[int | None, CausalBlocks] = {}

        def look(layer: int, made: Projected, keys: torch.Tensor) -> None:
            if layer % step == step - 1:
                window = self._decoder.window(layer)
                if window not in masks:
                    masks[window] = CausalBlocks(asked, keys.dtype, window=window, hidden=hidden)
                queries = made.queries[:, -len(asked) :]
                see(masks[window].weights(queries, keys, self._decoder.scale(layer)))

        self._pass(positions, hidden=hidden, look=look, last_from=self._total)
        self._lead_is_there = True

    def fresh_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Probe`. Exact chunks are valid as stored and are not computed. Below `layer` the computed KV is written
        into the buffers, where it replaces less accurate KV."""
        layer = min(layer, self._decoder.layers - 1)
        exact = positions_of([chunk for chunk in self._chunks if chunk.exact]).to(self._tokens.device)
        wanted = torch.ones_like(self._reused)
        wanted[self._question :] = False
        wanted[exact] = False
        positions = wanted.nonzero().flatten()
        found: list[Projected] = []

        def look(at: int, made: Projected, _keys: torch.Tensor) -> None:
            if at == layer:
                found.append(made)

        stored_keys, stored_values = self.stored_kv(layer)
        self._pass(positions, look=look, layers=layer + 1, put_layers=layer, last_from=self._total)
        return tuple(  # type: ignore[return-value]
            self._over(stored, positions, new)
            for stored, new in ((stored_keys, found[0].unrotated_keys), (stored_values, found[0].values))
        )

    def stored_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Probe`."""
        reused, layer = self._reused.nonzero().flatten(), min(layer, self._decoder.layers - 1)
        keys, values = (tensor[:, reused] for tensor in self._layers[layer])
        return turned_back(keys, self._rotary_at(reused)), values

    def _over(self, stored: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        whole = stored.new_zeros(stored.shape[0], self._total, stored.shape[2])
        whole[:, self._reused] = stored
        whole[:, positions] = new
        return whole[:, self._reused]

    def _pass(
        self,
        positions: torch.Tensor,
        *,
        last_from: int,
        hidden: torch.Tensor | None = None,
        drift: Drift | None = None,
        look: _Look | None = None,
        layers: int | None = None,
        put_layers: int | None = None,
    ) -> torch.Tensor:
        """Compute the tokens at `positions` in the first `layers` layers (None: all); in the first `put_layers`, write
        their keys and values to the buffers. In the last one only the tokens from position `last_from` on attend, and
        their output is returned: of the others only keys and values are needed."""
        decoder, count = self._decoder, self._decoder.layers if layers is None else layers
        states, rotary = decoder.embed(self._tokens[positions]), self._rotary_at(positions)
        masks: dict[int | None, CausalBlocks] = {}
        empty = None if hidden is None else hidden.nonzero().flatten()
        for layer in range(count):
            keys, values = self._layers[layer]
            if empty is not None:
                # Memory that was never written may hold NaN, which no mask removes from a product.
                keys.index_fill_(1, empty, 0)
                values.index_fill_(1, empty, 0)
            made = decoder.project(layer, states, rotary)
            if drift is not None and not drift.is_empty:
                self._move(drift, made, keys, values)
            if put_layers is None or layer < put_layers:
                keys.index_copy_(1, positions, made.keys)
                values.index_copy_(1, positions, made.values)
                self._keep_keys(layer, positions, made.unrotated_keys)
            if look is not None:
                look(layer, made, keys)
            queries, window = made.queries, decoder.window(layer)
            if layer == count - 1:
                rest = int(torch.searchsorted(positions, last_from))
                positions, queries, states = positions[rest:], queries[:, rest:], states[:, rest:]
                masks.clear()
            if not len(positions):
                break
            if window not in masks:
                masks[window] = CausalBlocks(positions, keys.dtype, window=window, hidden=hidden)
            attended = masks[window].attend(queries, keys, values, decoder.scale(layer))
            states = decoder.finish(layer, states, attended)
        return states

    def _move(self, drift: Drift, made: Projected, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Measure drift, and spread it, in keys before RoPE, because it does not depend on position. Rotation is
        linear, so keys and their half-turned counterparts are spread together with the values, and rotated as they are
        added."""
        rows, seen = drift.rows, drift.seen
        shift = made.keys.index_select(1, rows) - keys.index_select(1, seen)
        shift = turned_back(shift, self._rotary_at(seen))
        values_shift = made.values.index_select(1, rows) - values.index_select(1, seen)
        spread = drift.spread(torch.cat((shift, half_turned(shift), values_shift), dim=-1))
        moved, moved_half, moved_values = torch.split(spread[:, :, None], shift.shape[-1], dim=-1)
        for cells, places, of in drift.places:
            # Added in place, cell by cell: expanding the drift per token first takes longer than all other steps.
            in_cells = (-1, of, shift.shape[-1])
            cos, sin = self._rotary.cos[places].view(in_cells), self._rotary.sin[places].view(in_cells)
            moving = keys[:, places].view(len(keys), *in_cells)
            moving.addcmul_(moved[:, cells], cos).addcmul_(moved_half[:, cells], sin)
            values[:, places].view(len(values), *in_cells).add_(moved_values[:, cells])

    def _keep_keys(self, layer: int, positions: torch.Tensor, keys: torch.Tensor) -> None:
        if self._kept_keys.shape[2]:
            slots = self._slots[positions]
            kept = slots >= 0
            self._kept_keys[layer, :, slots[kept]] = keys[:, kept]

    def _rotary_at(self, positions: torch.Tensor) -> RotaryTable:
        return RotaryTable(self._rotary.cos[positions], self._rotary.sin[positions])
