"""Where a fetch puts restored KV: what an engine's memory has to offer."""

from typing import Protocol

import torch


class Destination(Protocol):
    """Memory that a fetch fills, range by range: some neighbouring layers at some neighbouring positions of the prompt.

    The restore threads of a fetch call both methods, several threads at once, each for another range, in
    `torch.inference_mode`. For each range there is one `prepare`, then one `complete`, unless the range cannot be
    decoded: then it is not completed. Ranges that succeed never overlap. After `Fetch.finish` has returned, or
    `Fetch.finished` has returned a report, there are no more calls, and every range that was delivered is complete.

    Neither method may block: `Fetch.finish` waits until it has returned, also after the deadline. It may raise: then
    the chunk is missing, for the reason `destination`, and the engine computes it.
    """

    @property
    def layers(self) -> int:
        """Number of layers that the model has."""

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the keys and the values of a range, `[layers, kv_heads, tokens, head_dim]` each, of the model's
        dtype, whose head_dim is contiguous. Values are decoded into it, and keys are decoded and rotated there. It is
        the place itself where that has such a shape, and scratch memory elsewhere. Nobody else writes it before
        `complete`."""

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The tensors of `prepare` hold the range now: put it into its place, unless it is there already. When this
        returns, the engine may be told that the range has arrived. Nobody reads or writes the tensors after that."""
