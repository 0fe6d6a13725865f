"""Samples of every row of a model's weights, which reveal writes that torch does not count (`weight.data[5] *= 2`)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

COMPARED_WHOLE = 4096
"""Tensors with fewer values are compared in full."""

_BATCH = 8192
"""Number of values compared at a time. They are far apart in memory: 0.1 ms."""


class Strided(NamedTuple):
    """Evenly spaced values of a tensor: the arguments of `torch.as_strided`, which raises RuntimeError when the memory
    became smaller."""

    tensor: torch.Tensor
    size: tuple[int]
    stride: tuple[int]
    offset: int


def strided(tensor: torch.Tensor, length: int, step: int, first: int = 0) -> Strided:
    """`length` values of `tensor`, every `step`-th in memory, from its value `first` on."""
    return Strided(tensor, (length,), (step,), int(tensor.storage_offset()) + first)


def reach_of(tensor: torch.Tensor) -> int:
    """Number of values from the first to the last of `tensor` in memory, inclusive."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def every_row(tensor: torch.Tensor) -> Strided:
    """One value of each row of `tensor`, each one column before the previous. In a large matrix with enough rows
    this covers every column, too. A small tensor is taken in full."""
    reach = reach_of(tensor)
    step = 1 if reach <= COMPARED_WHOLE else max(1, reach // tensor.shape[0] - 1)
    return strided(tensor, -(-reach // step), step)


@torch.no_grad()
def read(samples: Iterable[Strided]) -> torch.Tensor:
    """Values of the samples as one row of bytes. All tensors are on one device."""
    return torch.cat([torch.as_strided(*sample) for sample in samples]).view(torch.uint8)


class WeightRows:
    """One value of every row of `tensors` as they are now. Once a value differs, every later answer is False."""

    def __init__(self, tensors: Sequence[torch.Tensor], embedding: torch.Tensor | None) -> None:
        self._batches = [(samples, read(samples)) for samples in _batches(tensors)]
        self._turns = itertools.cycle(self._batches)
        self._same = True
        self._embedding = None
        if embedding is not None and embedding.dim() == 2 and embedding.is_contiguous():
            sample = every_row(embedding)
            self._embedding = sample, torch.as_strided(*sample).detach().clone()

    def are_current(self) -> bool:
        """Whether all samples are unchanged: 2 ms for SmolLM2."""
        return self._noted(all(map(_is_current, self._batches)))

    def next_are_current(self) -> bool:
        """Whether the next few thousand samples are unchanged; each call checks the following ones."""
        return self._noted(not self._batches or _is_current(next(self._turns)))

    @torch.no_grad()
    def embed_alike(self, token_ids: torch.Tensor) -> bool:
        """Whether the input embeddings of these tokens are unchanged."""
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
        """Whether both hold the same values of the same tensors."""
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
