"""Batches by number: batch i of a seed is always the same samples, so a run can resume at any batch.

Works with every map-style dataset whose items are dicts of tensors, or which returns a whole batch from
`__getitems__`, as Hugging Face datasets do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffusionblocks.errors import UserError
from diffusionblocks.seeds import derive
from diffusionblocks.system.interruption import worker_ignores_ctrl_c


class BatchStream:
    """An endless shuffled stream over `dataset`, one permutation per epoch; incomplete batches are dropped."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, num_workers: int = 0) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if size == 0:
            raise UserError("the training data is empty")
        if batch_size < 1:
            raise UserError(f"batch size must be at least 1, got {batch_size}")
        if batch_size > size:
            raise UserError(
                f"batch size {batch_size} exceeds the {size} training samples; use --batch-size {size} or less"
            )
        self.dataset, self.size, self.batch_size, self.seed, self.num_workers = (
            dataset,
            size,
            batch_size,
            seed,
            num_workers,
        )
        self.batches_per_epoch = size // batch_size
        self._permutation: tuple[int, Tensor] = (-1, torch.empty(0))

    def indices(self, batch: int) -> list[int]:
        """Sample numbers of batch number `batch`."""
        epoch, position = divmod(batch, self.batches_per_epoch)
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._permutation = (epoch, torch.randperm(self.size, generator=generator))
        return self._permutation[1][position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def load(self, batches: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """Loads the numbered batches in order, ahead of time when there are workers."""
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=_Numbered(self, batches),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=worker_ignores_ctrl_c,
        )
        try:
            yield from loader
        except UserError as error:  # a worker's error arrives with its traceback in the text
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class _Numbered(Sampler[list[int]]):
    def __init__(self, stream: BatchStream, batches: Iterable[int]) -> None:
        self.stream, self.batches = stream, batches

    def __iter__(self) -> Iterator[list[int]]:
        return (self.stream.indices(batch) for batch in self.batches)


class Unread(Dataset):
    """A data set with a length and nothing in it, for a trainer whose batches come from elsewhere, or from nowhere."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def in_order(dataset: Dataset, batch_size: int) -> Iterable[dict[str, Tensor]]:
    """Every sample once, in order: what evaluation reads."""
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


def collate(items: Any) -> dict[str, Tensor]:
    """A list of dicts of tensors or numbers, or a dict of already stacked tensors -> dict of tensors [N, ...]."""
    if isinstance(items, dict):
        return items
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
