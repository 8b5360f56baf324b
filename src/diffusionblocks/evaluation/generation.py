"""Images from a trained run: sample sets, their metrics, and files of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusionblocks.data.images.latents import Autoencoder, LatentData
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation import features
from diffusionblocks.seeds import derive, generator
from diffusionblocks.system.files import replacing
from diffusionblocks.tasks import ImageGeneration
from diffusionblocks.theory.likelihood import image_bound
from diffusionblocks.training.task import Metric, mean_with_error

AT_ONCE = 250  # images made together
REFERENCES = 50_000  # real images that samples are compared with, at most


class Samples(NamedTuple):
    """images: uint8 [N, channels, height, width]. labels [N]. layer_evaluations: forward passes of a layer, in all."""

    images: Tensor
    labels: Tensor
    layer_evaluations: int
    seconds: float


def generate(
    run: Any, labels: Tensor, *, seed: int = 0, task: ImageGeneration | None = None, quiet: bool = False
) -> Samples:
    """Images of the given classes [N]. task: other settings of sampling than the run's."""
    parts = list(generated(run, labels, seed=seed, task=task, quiet=quiet))
    return Samples(
        images=torch.cat([part.images for part in parts]),
        labels=labels,
        layer_evaluations=sum(part.layer_evaluations for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def generated(
    run: Any, labels: Tensor, *, seed: int = 0, task: ImageGeneration | None = None, quiet: bool = False
) -> Iterator[Samples]:
    """The same in parts, with a progress bar, for sets that do not fit memory."""
    from rich.progress import track

    task, model = task or run.recipe.task, run.model
    passes: list[int] = []

    def count(block: int, level: float, z: Tensor, estimate: Tensor) -> None:
        passes.append(len(model.block(block).layers) * len(z) * (1 if task.guidance == 1.0 else 2))

    decoder = Autoencoder(run.recipe.data, run.recipe.train.device) if run.recipe.data.vae else None
    starts = range(0, len(labels), AT_ONCE)
    for start in track(starts, "sampling", disable=quiet or len(starts) < 2, transient=True, console=_console()):
        began, part = time.perf_counter(), labels[start : start + AT_ONCE]
        passes.clear()
        found = task.sample(model, part, seed=derive(seed, "samples", start), device=run.trainer.device, watch=count)
        pixels = to_pixels(found if decoder is None else decoder.decode(found.cpu()))
        yield Samples(pixels, part, sum(passes), time.perf_counter() - began)


def to_pixels(images: Tensor) -> Tensor:
    """Values about [-1, 1] -> uint8."""
    return ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def source(part: Any) -> ImageData:
    """The images behind a split, whether the network reads them or their latents."""
    return part.source if isinstance(part, LatentData) else part


def metrics(run: Any, split: Any) -> dict[str, Metric]:
    """Of `evaluation.num_samples` images with the classes of `split` in its shares, against the images of `split`.

    `feature_distance`, `kernel_distance` and `class_accuracy` (see features.py; `class_accuracy_real` is what the
    images of `split` themselves reach), or `fid` and `kid` where the recipe names the Inception network, each also
    against the training images (`..._train`). With several `evaluation.sample_sets`, of the set of samples that comes
    nearest, as the protocol of FID wants it ([EDM] section 5). `bits_per_dimension` for images that are not latents (an
    upper bound, theory/likelihood.py) and, with several blocks, the share of each block in it.
    """
    task, recipe, reference = run.recipe.task, run.recipe, source(split)
    found: dict[str, Metric] = {}
    if task.num_samples:
        small = features.small_network(source(run.data.train), recipe.data, len(run.data.classes))
        extractor = features.Inception(task.inception) if task.inception else small
        small, extractor = small.to(run.trainer.device), extractor.to(run.trainer.device)
        labels = reference.labels[torch.arange(task.num_samples) * len(reference) // task.num_samples]
        real, real_right = _measured(extractor, small, _in_parts(reference))
        tries = []
        for seed in range(task.evaluations):
            parts = ((made.images, made.labels) for made in generated(run, labels, seed=seed))
            samples, samples_right = _measured(extractor, small, parts)
            tries.append((features.distances(extractor.names, samples, real), samples, samples_right))
        nearest, samples, samples_right = min(tries, key=lambda one: one[0][extractor.names[0]].value)
        found |= nearest
        trained, _ = _measured(extractor, small, _in_parts(source(run.data.train)))
        found |= {f"{name}_train": m for name, m in features.distances(extractor.names, samples, trained).items()}
        found["class_accuracy"] = mean_with_error(100.0 * samples_right)
        found["class_accuracy_real"] = mean_with_error(100.0 * real_right)
    if not recipe.data.vae:
        found |= bits_per_dimension(run, split)
    return found


def _in_parts(images: ImageData) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels, some at a time; of a very large set `REFERENCES` images, evenly spaced."""
    count = min(len(images), REFERENCES)
    chosen = [row * len(images) // count for row in range(count)]
    for start in range(0, count, AT_ONCE):
        rows = chosen[start : start + AT_ONCE]
        yield images.pixels(rows), images.labels[rows]


def _measured(
    extractor: features.Features, classifier: features.SmallNetwork, parts: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Features of images [N, F], and whether they are classified as they should [N]."""
    own, right = [], []
    for images, labels in parts:
        own.append(features.extract(extractor, images))
        right.append(features.right(classifier, images, labels))
    return torch.cat(own), torch.cat(right)


@torch.no_grad()
def bits_per_dimension(run: Any, split: Any) -> dict[str, Metric]:
    """The bound on the images of a split, given their classes."""
    model, device = run.model, run.trainer.device
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


def sample_to_file(
    run: Any, num: int, output: Path, *, classes: Sequence[int] = (), seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Makes `num` images and writes a PNG grid or an .npz (arr_0 uint8 [N, height, width, 3], arr_1 labels [N]: what
    the evaluator of ADM, Dhariwal & Nichol 2021, reads).

    Args:
        classes: taken in turn; all when empty. settings: fields of `ImageGeneration` that differ from the run's.

    Raises UserError for a class that does not exist, guidance without a null class, or an unknown kind of file.
    """
    names = run.data.classes
    if num < 1:
        raise UserError(f"--num must be at least 1, got {num}")
    for index in classes:
        if not 0 <= index < len(names):
            raise UserError(
                f"class {index} does not exist: classes are 0 to {len(names) - 1} ({', '.join(names[:12])})"
            )
    if output.suffix not in (".png", ".npz"):
        raise UserError(f"--output must end in .png (a grid) or .npz (the samples), got {output.name!r}")
    task = dataclasses.replace(run.recipe.task, **settings)
    chosen = torch.tensor(list(classes) or range(len(names)))
    with run.trainer.averaged():
        made = generate(run, chosen[torch.arange(num) % len(chosen)], seed=seed, task=task)
    with replacing(output) as partial:
        if output.suffix == ".npz":
            array = made.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
            with partial.open("wb") as stream:
                np.savez(stream, array, made.labels.numpy())
        else:
            write_grid(made.images, partial)
    return {
        "output": str(output),
        "num": num,
        "classes": [names[label] for label in made.labels.tolist()],
        "sampler": task.sampler,
        "steps": task.sampling_steps,
        "guidance": task.guidance,
        "seed": seed,
        "layer_evaluations_per_image": made.layer_evaluations / num,
        "seconds": round(made.seconds, 3),
    }


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
