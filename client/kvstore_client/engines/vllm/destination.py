"""Fetched KV goes into the blocks that the scheduler has given to a request."""

from collections.abc import Sequence

import torch

from kvstore_client.engines.vllm.layout import BlockLayout


class PagedDestination:
    """The blocks of one request in every layer. A `Destination` of a fetch.

    `tensors` are the registered KV tensors in the order of the model's layers. `block_ids` are the scheduler's blocks
    in the order of the prompt. The blocks must belong to the request until the fetch has finished.
    """

    def __init__(
        self, layout: BlockLayout, tensors: Sequence[torch.Tensor], block_ids: Sequence[int] | torch.Tensor
    ) -> None:
        self._layout = layout
        self._tensors = tuple(tensors)
        self._block_ids = torch.as_tensor(block_ids, dtype=torch.int64, device="cpu")

    @property
    def layers(self) -> int:
        return len(self._tensors)

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scratch memory on the host: a range spans blocks that lie apart, so no view of them has its shape."""
        shape = (
            layers.stop - layers.start,
            self._layout.kv_heads,
            tokens.stop - tokens.start,
            self._layout.head_dim,
        )
        dtype = self._tensors[0].dtype
        return torch.empty(shape, dtype=dtype, device="cpu"), torch.empty(shape, dtype=dtype, device="cpu")

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        for tensor, layer_keys, layer_values in zip(self._tensors[layers], keys, values, strict=True):
            self._layout.write(tensor, self._block_ids, tokens.start, layer_keys, layer_values)
        device = self._tensors[0].device
        if device.type == "cuda":
            # The engine reads the blocks from another stream, and may do so as soon as this returns.
            torch.cuda.current_stream(device).synchronize()
