"""The splits of a recipe's data, images or text: what its configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.latents import load_data
from diffusionblocks.data.images.splits import ImageSplits
from diffusionblocks.data.stream import Unread
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextSplits, load_text
from diffusionblocks.data.text.tokenizers import load_tokenizer

Splits = ImageSplits | TextSplits


def load_splits(config: DataConfig | TextConfig, seed: int = 0, *, mask: bool = False, device: str = "auto") -> Splits:
    """Reads, checks and splits the data.

    Args:
        seed: steers augmentation and the offsets of windows. mask: text needs a token that hides others. device: of the
            autoencoder, where images become latents.

    Raises UserError for anything wrong with the data.
    """
    if isinstance(config, TextConfig):
        return load_text(config, seed, mask=mask)
    return load_data(config, seed, device)


def without_samples(
    config: DataConfig | TextConfig, size: int, *, mask: bool = False, classes: Sequence[str] | None = None
) -> Splits | None:
    """Splits of `size` samples that cannot be read, for a model that is only to be run. None for images without the
    names of their classes, which only the data could tell."""
    nothing = Unread(size)
    if isinstance(config, TextConfig):
        tokenizer = load_tokenizer(config.tokenizer, mask, config.trust_remote_code)
        return TextSplits(nothing, nothing, nothing, tokenizer)
    return None if classes is None else ImageSplits(nothing, nothing, nothing, list(classes))
