"""What generated images are like, beside real ones, and how likely real ones are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.images import ImageBlocks, ImageNetwork
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.latents import LatentData
from diffusionblocks.data.images.splits import ImageData, ImageSplits
from diffusionblocks.data.stream import Unread
from diffusionblocks.evaluation import features
from diffusionblocks.seeds import generator
from diffusionblocks.theory.likelihood import image_bound
from diffusionblocks.training.task import Images, Metric, mean_with_error

AT_ONCE = 250  # images measured together
REFERENCES = 50_000  # real images that samples are compared with, at most


def source(part: ImageData | LatentData) -> ImageData:
    """The images behind a split, whether the network reads them or their latents."""
    return part.source if isinstance(part, LatentData) else part


def check(num_samples: int, inception: str, split: Dataset) -> None:
    """Raises UserError where so many samples, or the images of `split`, are too few for `of_samples`."""
    least = features.Inception(inception).num_features if inception else features.WIDTH
    features.check("samples", num_samples, least)
    if not isinstance(split, Unread):
        features.check("reference images", len(split), least)  # type: ignore[arg-type]


def of_samples(
    make: Callable[[Tensor, int], Iterable[Images]],
    num_samples: int,
    split: ImageData | LatentData,
    data: ImageSplits,
    config: DataConfig,
    *,
    sets: int = 1,
    inception: str = "",
    device: torch.device,
) -> dict[str, Metric]:
    """Of `num_samples` images with the classes of `split` in its shares, against the images of `split`.

    `feature_distance`, `kernel_distance` and `class_accuracy` (see features.py; `class_accuracy_real` is what the
    images of `split` themselves reach), or `fid` and `kid` where `inception` names the Inception network, each also
    against the training images (`..._train`).

    Args:
        make: (classes [N], seed) -> images, in parts. sets: of samples, of which the one counts that comes nearest to
            the real images, as the protocol of FID wants it ([EDM] section 5).
    """
    reference, training = source(split), source(data.train)
    small = features.small_network(training, config, len(data.classes))
    extractor = features.Inception(inception) if inception else small
    small, extractor = small.to(device), extractor.to(device)
    labels = reference.labels[torch.arange(num_samples) * len(reference) // num_samples]
    real, real_right = _measured(extractor, small, _in_parts(reference))
    tries = []
    for seed in range(sets):
        samples, samples_right = _measured(extractor, small, make(labels, seed))
        tries.append((features.distances(extractor.names, samples, real), samples, samples_right))
    nearest, samples, samples_right = min(tries, key=lambda one: one[0][extractor.names[0]].value)
    trained, _ = _measured(extractor, small, _in_parts(training))
    return {
        **nearest,
        **{f"{name}_train": m for name, m in features.distances(extractor.names, samples, trained).items()},
        "class_accuracy": mean_with_error(100.0 * samples_right),
        "class_accuracy_real": mean_with_error(100.0 * real_right),
    }


def _in_parts(images: ImageData) -> Iterator[Images]:
    """Pixels and labels, some at a time; of a very large set `REFERENCES` images, evenly spaced."""
    count = min(len(images), REFERENCES)
    chosen = [row * len(images) // count for row in range(count)]
    for start in range(0, count, AT_ONCE):
        rows = chosen[start : start + AT_ONCE]
        yield Images(images.pixels(rows), images.labels[rows])


def _measured(
    extractor: features.Features, classifier: features.SmallNetwork, parts: Iterable[Images]
) -> tuple[Tensor, Tensor]:
    """Features of images [N, F], and whether they are classified as they should [N]."""
    own, right = [], []
    for images, labels in parts:
        own.append(features.extract(extractor, images))
        right.append(features.right(classifier, images, labels))
    return torch.cat(own), torch.cat(right)


@torch.no_grad()
def bits_per_dimension(model: ImageBlocks | ImageNetwork, split: ImageData, device: torch.device) -> dict[str, Metric]:
    """`bits_per_dimension` of the images of a split, given their classes (an upper bound, theory/likelihood.py), and,
    with several blocks, the share of each block in it."""
    totals, shares = [], []
    for start in range(0, len(split), AT_ONCE):
        rows = list(range(start, min(start + AT_ONCE, len(split))))
        batch = {name: tensor.to(device) for name, tensor in split.__getitems__(rows).items()}

        def estimate(block: int, rows: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
            return model.denoiser(block)(
                {"noisy_target": z, "labels": batch["labels"][rows]},  # noqa: B023
                sigma,
            ).estimate

        bound = image_bound(
            estimate,
            batch["pixel_values"],
            model.partition,
            levels_per_block=max(1, 12 // model.partition.num_blocks),
            generator=generator(start, device),
        )
        unit = batch["pixel_values"][0].numel() * np.log(2)
        totals.append(bound.total / unit)
        shares.append(bound.blocks / unit)
    found = {"bits_per_dimension": mean_with_error(torch.cat(totals))}
    if model.partition.num_blocks > 1:
        found |= {
            f"bits_block_{block}": mean_with_error(column) for block, column in enumerate(torch.cat(shares).unbind(1))
        }
    return found
