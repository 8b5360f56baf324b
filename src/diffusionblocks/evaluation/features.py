"""Distances between sets of images in the features of a network.

The original Inception network makes them FID and KID (Heusel et al. 2017, arXiv 1706.08500; Binkowski et al. 2018,
arXiv 1801.01401). Without its weights a small residual network is trained to classify the recipe's own training images;
its distances are called feature_distance and kernel_distance, and are comparable only among runs on the same data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from diffusionblocks.blocks.saving import read_tensors, save_tensors
from diffusionblocks.data.images.splits import DataConfig, ImageData
from diffusionblocks.data.stream import BatchStream
from diffusionblocks.errors import UserError
from diffusionblocks.system.cache import cache_folder, making, writable
from diffusionblocks.system.files import Damaged
from diffusionblocks.training.task import Metric

log = logging.getLogger("diffusionblocks")
SIDE = 32  # pixels that the small network reads
WIDTH = 64  # features
STEPS, BATCH, RATE = 800, 64, 2e-3
KERNEL_SUBSET, KERNEL_SUBSETS = 500, 50
AT_ONCE = 256  # images through a network at once


class Features(nn.Module):
    """uint8 images [N, channels, height, width] -> features [N, F]. names: of the distances. classes: logits, if it has
    any."""

    num_features: int
    names: tuple[str, str]


class SmallNetwork(Features):
    """A residual network of transformers (He et al. 2016) that classifies the recipe's training images."""

    num_features = WIDTH
    names = ("feature_distance", "kernel_distance")

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        options: Any = dict(
            num_channels=channels,
            embedding_size=32,
            hidden_sizes=[32, 48, WIDTH],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=num_classes,
        )
        self.network = ResNetForImageClassification(ResNetConfig(**options))

    def _read(self, images: Tensor) -> Tensor:
        return interpolate(images.float() / 127.5 - 1, (SIDE, SIDE), mode="bilinear", antialias=images.shape[-1] > SIDE)

    def logits(self, images: Tensor) -> Tensor:
        return self.network(self._read(images)).logits

    def forward(self, images: Tensor) -> Tensor:
        return self.network.resnet(self._read(images)).pooler_output.flatten(1)


class Inception(Features):
    """The original Inception network from a TorchScript file, as StyleGAN3 and EDM distribute it
    (inception-2015-12-05.pt), or any scripted network with the same call."""

    names = ("fid", "kid")

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            self.network: Any = torch.jit.load(path, map_location="cpu").eval()
            self.num_features = self.forward(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"evaluation.inception: cannot load {path} as TorchScript that maps images to features ({reason})"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1).contiguous(), return_features=True)


def small_network(train: ImageData, config: DataConfig, num_classes: int) -> SmallNetwork:
    """The feature network of a data set: trained once with a fixed seed on the CPU, kept in the cache folder."""
    facts = repr((train.identity(), config.channels, num_classes, SIDE, WIDTH, STEPS, BATCH, RATE))
    path = (
        cache_folder(config.cache_dir)
        / f"features-{hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()}.safetensors"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNetwork(config.channels, num_classes)
        if path.exists() and not _take(network, path):
            log.warning("the feature network %s is damaged; it is trained again", path)
            with writable(path.parent):
                path.unlink()
        if not path.exists():
            log.info("training the feature network on the recipe's own images (once)")
            _fit_and_keep(network, train, path)
    return network.eval()


def _take(network: SmallNetwork, path: Path) -> bool:
    """Takes over weights that were kept; False for damaged ones."""
    try:
        network.load_state_dict(read_tensors(path)[0])
    except (Damaged, OSError, RuntimeError):
        return False
    return True


def _fit_and_keep(network: SmallNetwork, train: ImageData, path: Path) -> None:
    with making(path) as own:  # a folder that cannot be written is said before the training
        _fit(network, train)
        save_tensors(network.state_dict(), own, {"format": "pt"})
        _first_wins(own, path)
    if not _take(network, path):
        raise UserError(f"the feature network {path} does not keep what is written: pass --data.cache-dir FOLDER")


def _first_wins(own: Path, path: Path) -> None:
    """Several runs may train the network at once: all of them use the file that was there first."""
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(own, path)


@torch.enable_grad()
def _fit(network: SmallNetwork, train: ImageData) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    stream = BatchStream(train, min(BATCH, len(train)), seed=0)
    for number in range(STEPS):
        rows = stream.indices(number)
        loss = cross_entropy(network.logits(train.pixels(rows)), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()


def check(what: str, count: int, num_features: int) -> None:
    """Raises UserError when so many images do not determine a covariance of the features, or torchmetrics is
    missing."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("metrics of samples need torchmetrics: pip install 'diffusionblocks[images]'")
    if count <= num_features:
        remedy = f"set evaluation.num_samples {'higher, or ' if what == 'samples' else ''}to 0"
        raise UserError(
            f"a distance over {num_features} features needs at least {num_features + 1} {what}, got {count}; "
            f"{remedy} for no metrics of samples"
        )


@torch.no_grad()
def extract(network: Features, images: Tensor) -> Tensor:
    """uint8 images [N, channels, height, width] -> features [N, F] on the CPU. The network runs where it is."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return torch.cat([network(part.to(device)).cpu() for part in images.split(AT_ONCE)])


def distances(names: tuple[str, str], samples: Tensor, reference: Tensor) -> dict[str, Metric]:
    """Frechet distance, and kernel distance (unbiased MMD with a cubic polynomial kernel), of features [N, F] and
    [M, F].

    Raises UserError when there are too few images.
    """
    check("samples", *samples.shape)
    check("reference images", *reference.shape)
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        same = _Identity(samples.shape[1])  # the features are there already
        subset = min(KERNEL_SUBSET, len(samples), len(reference))
        frechet: Any = FrechetInceptionDistance(feature=same)
        kernel: Any = KernelInceptionDistance(feature=same, subsets=KERNEL_SUBSETS, subset_size=subset)
        for metric in (frechet, kernel):
            metric.update(reference, real=True)
            metric.update(samples, real=False)
        mean, _ = kernel.compute()  # its deviation is over overlapping subsets: no standard error
        return {names[0]: Metric(frechet.compute().item(), None), names[1]: Metric(mean.item(), None)}


class _Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def right(network: SmallNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the classifier gives each image its own class, bool [N]."""
    device = next(network.parameters()).device
    return torch.cat([network.logits(part.to(device)).argmax(1).cpu() for part in images.split(AT_ONCE)]) == labels
