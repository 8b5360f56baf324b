"""One picture of any kind as 8-bit grey or colour, as a viewer would show it: upright, 16 bits scaled to 8,
transparency on white.

Only the formats that are meant are opened: Pillow knows some that hand a file to another program (Ghostscript reads
EPS).
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FILES = ("PNG", "JPEG")  # in folders
ROWS = (*FILES, "WEBP", "GIF", "BMP", "TIFF")  # in Hugging Face datasets
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # the tag of EXIF
TURNS = {  # by the value of that tag
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def checked(path: str | Path) -> os.stat_result:
    """Size and time of a file. Raises ValueError for what cannot be read: a pipe or a device, for one, is never
    opened."""
    try:
        found = os.stat(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and Path(path).is_symlink()
        raise ValueError(
            "it is a link to a file that does not exist" if missing else error.strerror or type(error).__name__
        ) from None
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file but a pipe, socket or device")
    if not found.st_size:
        raise ValueError("it is empty")
    return found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings of what is odd but can be read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def read(source: Any, mode: str, formats: tuple[str, ...] = ROWS) -> tuple[Image.Image, bool]:
    """A path, bytes or Pillow's image -> the picture, and whether it had transparent places.

    Args:
        mode: `L` or `RGB`. formats: names of Pillow's formats that a file may have; it is opened as nothing else.

    Raises ValueError, or what Pillow raises (many kinds of errors), for what cannot be shown.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        image = source
    else:
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is no {', '.join(formats[:-1])} or {formats[-1]} image, or damaged") from None
    image.load()  # of several frames the first
    turn = TURNS.get(_orientation(image))
    seen = _seen_through(image) if image.mode != mode or image.info else None
    plain = _converted(image, mode) if seen is None else _on_white(seen, mode)
    return (plain if turn is None else plain.transpose(Image.Transpose[turn])), seen is not None


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data beside a whole image: many kinds of errors
        return None


def _seen_through(image: Image.Image) -> Image.Image | None:
    """The image with transparency of its own as RGBA or LA, or None where all of it is opaque."""
    from PIL import Image

    if image.mode in TRANSPARENT:
        if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        elif image.mode == "PA":
            image = image.convert("RGBA")
    elif image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        image = image.convert("RGBA")
    elif (key := image.info.get("transparency")) is None:
        return None
    elif image.mode in (*SIXTEEN, "I"):
        wide = np.asarray(image)
        opaque = Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8))
        image = Image.merge("LA", (_converted(image, "L"), opaque))
    elif image.mode in ("1", "L", "P", "RGB"):
        if image.mode == "RGB" and max(key) > 255:  # of 16 bits per channel, of which Pillow reads the upper 8
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
    else:
        return None
    return None if image.getchannel("A").getextrema() == (255, 255) else image


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB").convert(mode)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode in SIXTEEN:
        return _eight(np.asarray(image)).convert(mode)
    if image.mode == "I":  # as older versions of Pillow read 16-bit PNGs
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
        return _eight(wide).convert(mode)
    if image.mode == "PA" or image.mode in TRANSPARENT:
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in OPAQUE:
        raise ValueError(
            f"its pixels have Pillow's mode {image.mode}, which is neither grey nor colour of 8 or 16 bits"
        )
    elif image.mode == "P" or (image.mode == "CMYK" and mode == "L"):
        image = image.convert("RGB")
    return image.convert(mode)


def _eight(wide: np.ndarray) -> Image.Image:
    """16 bits scaled to 8: 65,535 is 255."""
    from PIL import Image

    return Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8))
