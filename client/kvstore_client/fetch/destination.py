"""Interface of the memory that a fetch writes restored KV to."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Destination(Protocol):
    """Memory that a fetch fills range by range. A range is some contiguous layers at some contiguous positions of the
    prompt.

    The restore threads of a fetch call both methods concurrently, each for another range, in `torch.inference_mode`.
    Each range gets one `prepare`, then one `complete`; a range that cannot be decoded is not completed. Ranges that
    succeed never overlap. After `Fetch.finish` has returned, or `Fetch.finished` has returned a report, there are no
    more calls, and every delivered range is complete.

    Neither method may block: `Fetch.finish` waits for them, even after the deadline. Both may raise: the chunk is then
    missing with the reason `destination`, and the engine computes it.
    """

    @property
    def layers(self) -> int:
        """Number of the model's layers."""

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the keys and the values of a range, `[layers, kv_heads, tokens, head_dim]` each, in the model's
        dtype, with contiguous head_dim. Values are decoded into it; keys are decoded and rotated there. Return the
        final memory where it has such a shape, otherwise scratch memory. Nobody else writes it before `complete`."""

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the range, which the tensors of `prepare` now hold, to its final memory, unless it is there already.
        The engine may be told that the range has arrived as soon as this returns. The tensors are not used
        afterwards."""


@dataclass(frozen=True, slots=True)
class DestinationInFront:
    """Base of destinations that only change what is completed in the destination behind them, `inner`."""

    inner: Destination

    @property
    def layers(self) -> int:
        return self.inner.layers

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.prepare(layers, tokens)
