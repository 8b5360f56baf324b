"""Many images as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """Values about [-1, 1] -> uint8."""
    return ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int = 0, gap: int = 1) -> np.ndarray:
    """uint8 images [N, channels, height, width] -> one picture [height, width] or [height, width, 3]."""
    count, channels, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return (canvas[:, :, 0] if channels == 1 else canvas).numpy()


def write_grid(images: Tensor, output: Path, *, at_least: int = 400) -> None:
    """A PNG of all images, enlarged by a whole factor where it would be smaller than `at_least` pixels."""
    from PIL import Image

    picture = Image.fromarray(grid(images))
    factor = max(1, -(-at_least // max(picture.size)))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(output, "PNG")
