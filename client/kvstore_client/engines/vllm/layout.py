"""Where the keys and values of one layer lie in the paged KV tensor that vLLM registers for it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_codec.errors import InvalidKVError


@dataclass(frozen=True, slots=True)
class BlockLayout(ABC):
    """Reads and writes keys and values of a request in one layer's tensor.

    The scheduler names blocks of `block_tokens * split` tokens. Where an attention kernel wants smaller blocks, the
    engine cuts each of them into `split` neighbouring blocks of the tensor.
    """

    block_tokens: int
    """Tokens in one block of the tensor."""
    kv_heads: int
    """KV heads of this tensor-parallel rank."""
    head_dim: int
    split: int = 1
    """Blocks of the tensor in one block of the scheduler."""

    @abstractmethod
    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every block: views
        `[blocks, kv_heads, token groups, tokens of a group, channel groups, channels of a group]`."""

    def read(
        self, tensor: torch.Tensor, block_ids: Sequence[int] | torch.Tensor, first_token: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of `tokens` tokens from `first_token` on, `[kv_heads, tokens, head_dim]` each.

        `block_ids` are the scheduler's blocks in the order of the prompt; its token 0 is the first token of the first
        block. Raises InvalidKVError when the tokens lie outside these blocks, or the blocks outside the tensor.
        """
        ids, inside = self._blocks(block_ids, first_token, tokens)
        keys, values = (self._gather(view, ids, inside, tokens) for view in self._checked_views(tensor, ids))
        return keys, values

    def write(
        self,
        tensor: torch.Tensor,
        block_ids: Sequence[int] | torch.Tensor,
        first_token: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Put keys and values, `[kv_heads, tokens, head_dim]` each, into the blocks. Leaves other tokens of the same
        blocks alone, so that several threads may write different tokens. Block ids and errors as for `read`."""
        ids, inside = self._blocks(block_ids, first_token, keys.shape[1])
        key_view, value_view = self._checked_views(tensor, ids)
        self._scatter(key_view, ids, inside, keys)
        self._scatter(value_view, ids, inside, values)

    def _blocks(
        self, block_ids: Sequence[int] | torch.Tensor, first_token: int, tokens: int
    ) -> tuple[torch.Tensor, int]:
        """The tensor's blocks that hold these tokens, and the place of the first token in the first of them."""
        ids = torch.as_tensor(block_ids, dtype=torch.int64, device="cpu")
        if self.split > 1:
            ids = (ids[:, None] * self.split + torch.arange(self.split, device="cpu")).flatten()
        end_token = first_token + tokens
        if not 0 <= first_token <= end_token <= len(ids) * self.block_tokens:
            raise InvalidKVError(
                f"tokens {first_token} to {end_token} do not lie in {len(ids)} blocks of {self.block_tokens} tokens"
            )
        first_block, inside = divmod(first_token, self.block_tokens)
        return ids[first_block : -(-end_token // self.block_tokens)], inside

    def _checked_views(self, tensor: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.views(tensor)
        # A negative index would silently address a block from the end.
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(keys):
            raise InvalidKVError(f"a block id lies outside the {len(keys)} blocks of the tensor")
        return keys, values

    def _gather(self, view: torch.Tensor, ids: torch.Tensor, inside: int, tokens: int) -> torch.Tensor:
        blocks = view.index_select(0, ids.to(view.device)).transpose(0, 1)
        kv = blocks.reshape(self.kv_heads, len(ids) * self.block_tokens, self.head_dim)
        return kv[:, inside : inside + tokens]

    def _scatter(self, view: torch.Tensor, ids: torch.Tensor, inside: int, kv: torch.Tensor) -> None:
        """Whole blocks take one operation together; a partly written block at either end takes one more."""
        kv = kv.to(view.device)
        tokens = kv.shape[1]
        begin = min(-inside % self.block_tokens, tokens)
        whole = (tokens - begin) // self.block_tokens
        end = begin + whole * self.block_tokens
        if begin:
            self._put_part(view[int(ids[0])], inside, kv[:, :begin])
        if whole:
            first = 1 if begin else 0
            blocks = kv[:, begin:end].reshape(self.kv_heads, whole, *view.shape[2:])
            view[ids[first : first + whole].to(view.device)] = blocks.transpose(0, 1)
        if end < tokens:
            self._put_part(view[int(ids[-1])], 0, kv[:, end:])

    @staticmethod
    def _put_part(block: torch.Tensor, first: int, kv: torch.Tensor) -> None:
        """Put tokens into a block from its token `first` on."""
        tokens, group_tokens = kv.shape[1], block.shape[2]
        slots = torch.arange(first, first + tokens, device=block.device)
        block[:, slots // group_tokens, slots % group_tokens] = kv.reshape(len(kv), tokens, *block.shape[3:])


class RowMajorCpuLayout(BlockLayout):
    """`CPU_ATTN` with the kernels `vec` and `vec16`: `[blocks, kv_heads, block_tokens, 2 * head_dim]` by shape. The
    memory of a block and head holds the keys as `[head_dim, block_tokens]`, then the values as
    `[block_tokens, head_dim]`."""

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = _halves(tensor)
        of_head = keys.shape[:2]
        transposed = keys.view(*of_head, self.head_dim, self.block_tokens).transpose(-1, -2)
        return _one_group(transposed), _one_group(values.view(*of_head, self.block_tokens, self.head_dim))


class AmxCpuLayout(BlockLayout):
    """`CPU_ATTN` with the kernel `amx`, which multiplies tiles of 16 columns of bfloat16 pairs. The memory of a block
    and head holds the keys as `[block_tokens / 16, head_dim / 2, 16 tokens, 2 channels]`, then the values as
    `[head_dim / 16, block_tokens / 2, 16 channels, 2 tokens]`."""

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = _halves(tensor)
        of_head = keys.shape[:2]
        key_tiles = keys.view(*of_head, self.block_tokens // 16, self.head_dim // 2, 16, 2)
        value_tiles = values.view(*of_head, self.head_dim // 16, self.block_tokens // 2, 16, 2)
        return key_tiles.permute(0, 1, 2, 4, 3, 5), value_tiles.permute(0, 1, 3, 5, 2, 4)


class PackedLayout(BlockLayout):
    """GPU backends since vLLM 0.26: `[blocks, kv_heads, block_tokens, 2 * head_dim]` by shape, keys before values,
    with the strides of whichever physical order the engine has chosen (heads before tokens, or tokens before heads)."""

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _one_group(tensor[..., : self.head_dim]), _one_group(tensor[..., self.head_dim :])


class SeparateLayout(BlockLayout):
    """GPU backends before vLLM 0.26: `[2, blocks, block_tokens, kv_heads, head_dim]`, keys before values."""

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = tensor.transpose(2, 3)
        return _one_group(keys), _one_group(values)


def _halves(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of the keys and of the values, `[blocks, kv_heads, block_tokens * head_dim]` each."""
    blocks, kv_heads, block_tokens, content = tensor.shape
    keys, values = tensor.view(blocks, kv_heads, 2, block_tokens * content // 2).unbind(2)
    return keys, values


def _one_group(view: torch.Tensor) -> torch.Tensor:
    """`[blocks, kv_heads, tokens, channels]` with one group of all tokens and one of all channels."""
    return view[:, :, None, :, None]
