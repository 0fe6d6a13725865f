"""Values of every row of a model's weights. Writes that torch does not count (`weight.data[5] *= 2`) show in them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

COMPARED_WHOLE = 4096
"""Values: smaller tensors are compared value by value."""

_BATCH = 8192
"""Values that are compared at a time. They lie far apart: .1 ms."""


class Strided(NamedTuple):
    """Values of a tensor that lie evenly in memory: what `torch.as_strided` takes. It raises RuntimeError when the
    memory became smaller."""

    tensor: torch.Tensor
    size: tuple[int]
    stride: tuple[int]
    offset: int


def strided(tensor: torch.Tensor, length: int, step: int, first: int = 0) -> Strided:
    """`length` values of `tensor`, every `step`-th in memory, from its value `first` on."""
    return Strided(tensor, (length,), (step,), int(tensor.storage_offset()) + first)


def reach_of(tensor: torch.Tensor) -> int:
    """How many values lie between the first and the last of `tensor` in memory, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def every_row(tensor: torch.Tensor) -> Strided:
    """A value of each row of `tensor`, each time of the column before: of a large matrix that is none of the narrowest,
    every column is among them, too. A small tensor is taken whole."""
    reach = reach_of(tensor)
    step = 1 if reach <= COMPARED_WHOLE else max(1, reach // tensor.shape[0] - 1)
    return strided(tensor, -(-reach // step), step)


@torch.no_grad()
def read(samples: Iterable[Strided]) -> torch.Tensor:
    """Their values as one row of bytes. All tensors are on one device."""
    return torch.cat([torch.as_strided(*sample) for sample in samples]).view(torch.uint8)


class WeightRows:
    """A value of every row of `tensors` as they are now. Once one was found to differ, every answer is that it does."""

    def __init__(self, tensors: Sequence[torch.Tensor], embedding: torch.Tensor | None) -> None:
        self._batches = [(samples, read(samples)) for samples in _batches(tensors)]
        self._turns = itertools.cycle(self._batches)
        self._same = True
        self._embedding = None
        if embedding is not None and embedding.dim() == 2 and embedding.is_contiguous():
            sample = every_row(embedding)
            self._embedding = sample, torch.as_strided(*sample).detach().clone()

    def are_current(self) -> bool:
        """Whether all of them have the values that they had: 2 ms for SmolLM2."""
        return self._noted(all(map(_is_current, self._batches)))

    def next_are_current(self) -> bool:
        """The same of a few thousand of them, each time of the next ones."""
        return self._noted(not self._batches or _is_current(next(self._turns)))

    @torch.no_grad()
    def embed_alike(self, token_ids: torch.Tensor) -> bool:
        """The same of the input embeddings of these tokens."""
        if self._embedding is None:
            return True
        sample, values = self._embedding
        row_starts, step = token_ids.to(values.device).flatten() * sample.tensor.shape[1], sample.stride[0]
        chosen = (row_starts + step - 1) // step
        now, before = torch.as_strided(*sample)[chosen], values[chosen]
        return self._noted(torch.equal(now.view(torch.uint8), before.view(torch.uint8)))

    def _noted(self, same: bool) -> bool:
        self._same = self._same and same
        return self._same

    def same_as(self, other: "WeightRows") -> bool:
        """Whether both found the same values in the same tensors."""
        return len(self._batches) == len(other._batches) and all(
            torch.equal(mine[1], others[1])
            for mine, others in zip(self._batches, other._batches, strict=True)
        )


def _is_current(batch: tuple[list[Strided], torch.Tensor]) -> bool:
    samples, values = batch
    return torch.equal(read(samples), values)


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[list[Strided]]:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    for on_device in by_device.values():
        batch: list[Strided] = []
        for piece in itertools.chain.from_iterable(map(_pieces, on_device)):
            if batch and sum(each.size[0] for each in batch) + piece.size[0] > _BATCH:
                yield batch
                batch = []
            batch.append(piece)
        yield batch


def _pieces(tensor: torch.Tensor) -> Iterator[Strided]:
    whole = every_row(tensor)
    (length,), (step,) = whole.size, whole.stride
    for begin in range(0, length, _BATCH):
        yield strided(tensor, min(_BATCH, length - begin), step, begin * step)
