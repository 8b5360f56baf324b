"""Labelled images by name, folder or Hugging Face dataset, split and turned into batches.

Images are held as 8-bit tensors in memory and become floats in [-1, 1] batch by batch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.data.images.augment import Augmentation
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.sources import SOURCES, Images, Labelled, LazyImages, class_folders
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.seeds import derive
from diffusionblocks.system.files import told

__all__ = ["DataConfig", "ImageData", "ImageSplits", "count_classes", "load_images"]


class ImageData(Dataset):
    """images uint8 [n, channels, height, width] and labels int64 [n] -> dicts pixel_values in [-1, 1], labels."""

    def __init__(self, images: Images, labels: Tensor, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self.images, self.labels, self.augmentation, self.seed = images, labels, augmentation, seed

    def pixels(self, rows: list[int]) -> Tensor:
        """Images by number, uint8 [n, channels, height, width], not augmented."""
        return self.images[rows]

    def identity(self) -> str:
        """A hash of the images (of what tells their files apart, where these are read when needed) and labels."""
        found = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        if isinstance(self.images, LazyImages):
            found.update(self.images.identity.encode() + self.images.numbers.tobytes())
        else:
            found.update(self.images.contiguous().numpy().tobytes())
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch; its augmentation depends on the run's seed and on which samples meet in the batch."""
        pixels = self.pixels(indices).float() / 127.5 - 1
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, derive(self.seed, "augment", *indices))
        return {"pixel_values": pixels, "labels": self.labels[indices]}


class ImageSplits(NamedTuple):
    """What a network reads: images, or their latents (data/images/latents.py)."""

    train: Any
    validation: Any
    test: Any
    classes: list[str]

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's summary says of the data."""
        return {"classes": self.classes}


def load_images(config: DataConfig, seed: int = 0) -> ImageSplits:
    """Reads, checks and splits. `seed` only steers augmentation; the split depends on `config.split_seed`.

    Raises UserError for anything wrong with the data.
    """
    source = "folder" if config.path and config.source in ("digits", "mnist") else config.source
    if source not in SOURCES:
        raise UserError(f"unknown data source {source!r}{nearest(source, SOURCES)}")
    if config.channels not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3 (colour), got {config.channels}")
    if config.image_size < 1:
        raise UserError(f"data.image_size must be at least 1 pixel, got {config.image_size}")
    with told():
        train, test, classes = SOURCES[source](config)
    for part in filter(None, (train, test)):
        check_labels(part.labels, len(classes))
    if test is None:
        train, test = _split(train, config.test_share, config.split_seed, "test")
    train, validation = _split(train, config.validation_share, config.split_seed, "validation")
    augmentation = Augmentation(config.augment, config.image_size) if config.augment else None
    return ImageSplits(ImageData(*train, augmentation, seed), ImageData(*validation), ImageData(*test), classes)


def count_classes(config: DataConfig) -> int:
    """Number of classes without reading an image; 1,000 where only the data could tell (a Hugging Face dataset)."""
    if config.path and config.source != "huggingface":
        return len(class_folders(Path(config.path))[1])
    return 10 if config.source in ("digits", "mnist") else 1000


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises UserError for a label [N] that is no class."""
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise UserError(
            f"labels must be 0 to {num_classes - 1} for {num_classes} classes; the data has {low} to {high}"
        )


def _split(data: Labelled, share: float, seed: int, name: str) -> tuple[Labelled, Labelled]:
    from sklearn.model_selection import train_test_split

    try:
        kept, taken = train_test_split(
            np.arange(len(data.labels)), test_size=share, stratify=data.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        counts = torch.bincount(data.labels)
        raise UserError(
            f"cannot take {share:g} of {len(data.labels)} images as {name} split by class "
            f"(the smallest class has {counts[counts > 0].min()}): {error}"
        ) from None
    return data.rows(kept), data.rows(taken)
