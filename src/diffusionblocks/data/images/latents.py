"""Images as latents of an autoencoder, encoded once and kept on disk (Rombach et al. 2022, arXiv 2112.10752).

A cache is a folder of shards, safetensors with mean and standard deviation of each image's latent (and of its mirror
image), and an index with the hash of every shard. Encoding that was interrupted goes on where it stopped; a damaged
shard is encoded again. The name of the folder is a hash of the images, their size and the autoencoder.

Shapes: n images, v versions (1, or 2 with the mirror image), c channels, s = size of the latent.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.data.images.splits import DataConfig, ImageData, ImageSplits, load_images
from diffusionblocks.errors import UserError, first_line, quiet_hub
from diffusionblocks.seeds import derive
from diffusionblocks.system.cache import cache_folder, file_hash, making
from diffusionblocks.system.devices import find_device
from diffusionblocks.system.files import Damaged, read_json, write_json
from diffusionblocks.theory.precondition import SIGMA_DATA

log = logging.getLogger("diffusionblocks")
SHARD = 1024  # images in a shard
AT_ONCE = 16  # images through the autoencoder at once
FITTING = (0.25, 4.0)  # standard deviations of scaled latents that a diffusion model can work with; 1 is meant


class Autoencoder:
    """A diffusers AutoencoderKL by name or folder, with its latents scaled to the standard deviation of EDM's data
    (0.5).

    Raises UserError when it cannot be loaded or does not fit the images.
    """

    def __init__(self, config: DataConfig, device: str = "auto") -> None:
        from diffusers import AutoencoderKL

        latent_shape(config)  # checks
        self.device = find_device(device)
        try:
            network, found = AutoencoderKL.from_pretrained(config.vae, use_safetensors=True, output_loading_info=True)
            self.network: Any = network.to(self.device).eval()
        except UserError:
            raise
        except Exception as error:  # diffusers, safetensors and torch raise many kinds for what is damaged
            raise UserError(f"cannot load the autoencoder {config.vae!r}: {first_line(error)}") from None
        if missing := found["missing_keys"]:
            raise UserError(f"the weights of the autoencoder {config.vae!r} lack {', '.join(sorted(missing)[:3])}")
        self.shift = float(self.network.config.get("shift_factor") or 0.0)
        self.scale = config.latent_scale or float(self.network.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [n, channels, size, size] -> mean and standard deviation of the scaled latents, fp32
        [n, 2, c, s, s]."""
        found = []
        for part in images.split(AT_ONCE):
            latents = self.network.encode(part.to(self.device).float() / 127.5 - 1).latent_dist
            mean, std = (latents.mean - self.shift) * self.scale, latents.std * self.scale
            found.append(torch.stack([mean, std], 1).cpu())
        return torch.cat(found) * SIGMA_DATA

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[n, c, s, s] -> pixels [n, channels, size, size], about [-1, 1]."""
        parts = (latents / SIGMA_DATA / self.scale + self.shift).split(AT_ONCE)
        return torch.cat([self.network.decode(part.to(self.device)).sample.cpu() for part in parts])


def latent_shape(config: DataConfig) -> tuple[int, int]:
    """Channels and size of the latents, from the autoencoder's config alone.

    Raises UserError when it cannot be read or does not fit the images.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("latents need diffusers: pip install 'diffusionblocks[images]'") from None
    quiet_hub()
    try:
        own = AutoencoderKL.load_config(config.vae)
    except Exception as error:  # diffusers raises many kinds for what is damaged
        raise UserError(
            f"cannot load the autoencoder {config.vae!r}: {first_line(error)} (offline, pass a local folder)"
        ) from None
    kind = own.get("_class_name") if isinstance(own, dict) else None
    if kind != "AutoencoderKL":
        raise UserError(f"data.vae must be an AutoencoderKL of diffusers; {config.vae} is {kind}")
    needed: dict[str, Any] = {"block_out_channels": (list, tuple), "in_channels": int, "latent_channels": int}
    for key, types in needed.items():
        if not isinstance(own.get(key), types) or not own[key]:
            raise UserError(f"the config of the autoencoder {config.vae!r} is damaged: {key} is {own.get(key)!r}")
    factor = 2 ** (len(own["block_out_channels"]) - 1)
    if config.image_size % factor:
        raise UserError(
            f"the autoencoder {config.vae} makes images {factor} times smaller: data.image_size {config.image_size} "
            f"must be divisible by {factor}"
        )
    if own["in_channels"] != config.channels:
        raise UserError(
            f"the autoencoder {config.vae} reads {own['in_channels']} channels; set data.channels to it (got "
            f"{config.channels})"
        )
    return own["latent_channels"], config.image_size // factor


class LatentData(Dataset):
    """Cached latents -> dicts pixel_values [c, s, s] (a draw from the latent's distribution) and labels.

    Args:
        shards: means and standard deviations, fp16 [n, v, 2, c, s, s] each. source: the images that they were made of.
    """

    def __init__(self, shards: list[Tensor], source: ImageData, seed: int) -> None:
        self.shards, self.source, self.seed = shards, source, seed
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch; its draw and its mirror images depend on the run's seed and on which samples meet in the batch."""
        generator = torch.Generator().manual_seed(derive(self.seed, "latents", *indices))
        both = torch.stack([self.shards[index // SHARD][index % SHARD] for index in indices]).float()
        version = torch.randint(both.shape[1], (len(indices),), generator=generator)
        mean, std = both[torch.arange(len(indices)), version].unbind(1)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return {"pixel_values": latents, "labels": self.labels[indices]}


def load_data(config: DataConfig, seed: int = 0, device: str = "auto") -> ImageSplits:
    """The images of a recipe, as latents where it names an autoencoder (which then runs on `device`). See
    `load_images`."""
    if not config.vae:
        return load_images(config, seed)
    if set(config.augment) - {"flip"}:
        raise UserError(f"latents can only be augmented by flip, got {', '.join(config.augment)}")
    latent_shape(config)
    plain = load_images(_without_augmentation(config), seed)
    encoder: list[Autoencoder] = []  # loaded when there is something to encode

    def latents(part: ImageData, mirror: bool = False) -> LatentData:
        return LatentData(_cached(part, config, encoder, device, mirror=mirror), part, seed)

    train = latents(plain.train, mirror=bool(config.augment))
    return ImageSplits(train, latents(plain.validation), latents(plain.test), plain.classes)


def _without_augmentation(config: DataConfig) -> DataConfig:
    import dataclasses

    return dataclasses.replace(config, augment=[])


def _cached(
    part: ImageData, config: DataConfig, encoder: list[Autoencoder], device: str, *, mirror: bool
) -> list[Tensor]:
    """The shards of one split, encoded where they are missing or damaged."""
    folder = cache_folder(config.cache_dir) / f"latents-{_key(part, config, mirror)}"
    channels, size = latent_shape(config)
    index_path = folder / "index.json"
    index = _read_index(index_path)
    starts = range(0, len(part), SHARD)
    shapes = [(min(SHARD, len(part) - start), 1 + mirror, 2, channels, size, size) for start in starts]
    paths = [folder / f"shard-{start // SHARD:05d}.safetensors" for start in starts]
    shards = [_read_shard(path, index, shape) for path, shape in zip(paths, shapes, strict=True)]
    missing = [number for number, shard in enumerate(shards) if shard is None]
    for count, number in enumerate(missing):
        if not encoder:
            encoder.append(Autoencoder(config, device))
        log.info("encoding images to latents: shard %d of %d", count + 1, len(missing))
        rows = list(range(starts[number], min(starts[number] + SHARD, len(part))))
        _write(paths[number], _encode(encoder[0], part.pixels(rows), mirror, config))
        index[paths[number].name] = file_hash(paths[number])
        with making(index_path) as partial:
            write_json(partial, index)
            os.replace(partial, index_path)
        shards[number] = _read_shard(paths[number], index, shapes[number])
    if any(shard is None for shard in shards):
        raise UserError(f"the latent cache {folder} does not keep what is written: pass --data.cache-dir FOLDER")
    return [shard for shard in shards if shard is not None]


def _read_shard(path: Path, index: dict[str, str], shape: tuple[int, ...]) -> Tensor | None:
    """Means and deviations of a shard [n, v, 2, c, s, s]; None when it is not there, or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.name not in index:
        return None
    try:
        if file_hash(path) == index[path.name]:
            latents = load_file(str(path))["latents"]
            if latents.shape == shape and latents.dtype == torch.float16:
                return latents
    except (OSError, KeyError, SafetensorError):
        pass
    log.warning("the latent cache %s is damaged; it is encoded again", path)
    return None


def _read_index(path: Path) -> dict[str, str]:
    """Hashes of the shards. A damaged index is an empty one."""
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
        if all(isinstance(value, str) for value in found.values()):
            return found
    except (Damaged, OSError):
        pass
    log.warning("the index of the latent cache %s is damaged; the images are encoded again", path.parent)
    return {}


def _encode(encoder: Autoencoder, images: Tensor, mirror: bool, config: DataConfig) -> Tensor:
    versions = [encoder.encode(images), *([encoder.encode(images.flip(-1))] if mirror else [])]
    latents = torch.stack(versions, 1)
    spread = (latents[:, :, 0].std() / SIGMA_DATA).item()
    if not FITTING[0] <= spread <= FITTING[1]:
        raise UserError(
            f"the latents of {config.vae} have a standard deviation of {spread:.3g} after scaling by "
            f"{encoder.scale:g}, and it should be about 1: set data.latent_scale to "
            f"{encoder.scale / max(spread, 1e-9):.4g}"
        )
    return latents.half()


def _write(path: Path, latents: Tensor) -> None:
    from safetensors.torch import save_file

    with making(path) as partial:  # other processes may encode the same images
        save_file({"latents": latents.contiguous()}, str(partial))
        os.replace(partial, path)


def _key(part: ImageData, config: DataConfig, mirror: bool) -> str:
    """Of the images, their size, and the autoencoder with its weights."""
    found = hashlib.blake2b(digest_size=12)
    for piece in (part.identity(), config.image_size, config.channels, config.latent_scale, mirror, config.vae):
        found.update(repr(piece).encode())
    for path in sorted(Path(config.vae).glob("*")) if Path(config.vae).is_dir() else []:
        if path.suffix in (".json", ".safetensors", ".bin"):
            found.update(f"{path.name} {file_hash(path)}".encode())
    return found.hexdigest()
