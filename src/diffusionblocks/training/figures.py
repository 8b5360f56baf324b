"""Figures of a task as values: what is shown, not how. The report draws them (report/figures.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pictures(NamedTuple):
    """Images uint8 [n, height, width] or [n, height, width, 3], each with its caption; right: False is marked."""

    images: np.ndarray
    captions: Sequence[str]
    right: Sequence[bool]


class Picture(NamedTuple):
    """One picture, uint8 [height, width] or [height, width, 3]."""

    image: np.ndarray


class Stage(NamedTuple):
    """Images on their way from noise, each uint8 [height, width] or [height, width, 3]. block: that runs next. level:
    of noise."""

    block: int
    level: float
    images: Sequence[np.ndarray]


class Stages(NamedTuple):
    """From noise to images, the same ones in every stage. num_blocks: of the model."""

    stages: Sequence[Stage]
    num_blocks: int


class Texts(NamedTuple):
    """Texts as they are."""

    texts: Sequence[str]


class Moment(NamedTuple):
    """A text on its way out of masks. level: share of masks. block: that runs next, None at the end. tokens: each with
    the block that wrote it, None while it is masked."""

    level: float
    block: int | None
    tokens: Sequence[tuple[str, int | None]]


class Moments(NamedTuple):
    """From masks to a text. num_blocks: of the model."""

    moments: Sequence[Moment]
    num_blocks: int


class Table(NamedTuple):
    """Texts side by side."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


Value = Pictures | Picture | Stages | Texts | Moments | Table


class Figure(NamedTuple):
    """A figure with its title."""

    title: str
    value: Value
