"""Image generation: y = the image (or its latent), condition = its class ([DB] section 5.2, [EDM]).

Every method trains with the same loss; a whole network is one denoiser of all noise levels, blocks have a range each.

Shapes: N batch, image [channels, height, width].
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.handed import Handed
from diffusionblocks.blocks.images import ImageBlocks, ImageNetwork, weighted_error
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.grid import grid, to_pixels
from diffusionblocks.data.images.latents import Autoencoder
from diffusionblocks.data.images.splits import ImageData
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.evaluation import images
from diffusionblocks.networks.parts import Batch
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, derive, generator, normal_like, uniform
from diffusionblocks.system.devices import wide
from diffusionblocks.theory.grids import GRIDS
from diffusionblocks.theory.ode import SAMPLERS
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.figures import Figure, Picture, Stage, Stages
from diffusionblocks.training.task import (
    Asked,
    Images,
    Made,
    Metric,
    Sampling,
    StepOutput,
    Task,
    TrainedOnImages,
    all_beside,
    drawn_for,
    mean_with_error,
)

AT_ONCE = 250  # images made together
SHOWN, PATHS, PATH_STEPS = 64, 4, 12  # in the report: images, those shown on their way, and steps of the way


class Generated(NamedTuple):
    """layer_evaluations: forward passes of a layer, in all."""

    images: Images
    layer_evaluations: int
    seconds: float


# What the paper describes and its released code does ([DB] sections 3 and 5.2, app. E).
PAPER: dict[str, Any] = {
    "blocks": {"shared": "trained", "levels": "log-normal", "sigma_min": 0.002, "sigma_max": 80.0, "overlap": 0.05},
    "task": {"sampler": "euler", "sampling_steps": 50, "grid": "rho", "guidance": 2.0, "label_dropout": 0.1},
    "train": {"order": "random", "branch_at": 0.0},
}


@dataclass(kw_only=True)
class ImageGeneration(Task):
    """Objective, evaluation and sampling of a class-conditional diffusion model.

    Args:
        kind: What is learned.
        label_dropout: Share of training samples whose class is hidden, for guidance. The null class takes its place.
        sampler: How a sample goes down the noise levels. `euler` ([DB]), `heun`, `dpm-solver++` or `churn`.
        sampling_steps: Steps down the noise levels.
        grid: Spacing of the noise levels of a sample. `rho` ([EDM], rho = 7) or `equal-mass`.
        guidance: Scale of classifier-free guidance; 1 = none. [DB] has 2.0. Other values run every step twice.
        num_samples: Samples that the finished run makes for its metrics; 0 = none.
        evaluations: Sets of samples, of which the nearest to the real images counts. The protocol of FID has 3.
        levels_per_image: Noise levels at which validation measures every image.
        inception: TorchScript file of the original Inception network, for fid and kid. Empty = a small feature network
            trained on the recipe's own images, reported as feature_distance.
    """

    target: ClassVar = "image"
    data: ClassVar = DataConfig
    presets: ClassVar = {"paper": PAPER}
    by_block: ClassVar = True
    compared_alike: ClassVar = ("sampler", "sampling_steps", "grid", "guidance", "label_dropout")
    unit: ClassVar = ""

    kind: str = option("image-generation", choices=("image-generation",))
    label_dropout: float = option(0.1, least=0, most=1, group="objective")
    sampler: str = option("dpm-solver++", choices=tuple(SAMPLERS), group="sampling")
    sampling_steps: int = option(20, least=1, group="sampling", key="steps")
    grid: str = option("rho", choices=tuple(GRIDS), group="sampling")
    guidance: float = option(1.0, least=0, group="sampling")
    num_samples: int = option(5000, least=0, group="evaluation")
    evaluations: int = option(1, least=1, group="evaluation", key="sample_sets")
    levels_per_image: int = option(4, least=1, group="evaluation")
    inception: str = option("", group="evaluation")

    def __post_init__(self) -> None:
        check_options("task", self)
        if self.guidance != 1.0 and self.label_dropout == 0:
            raise UserError(
                "guidance needs a null class, which training with objective.label_dropout 0 never shows the network"
            )

    def step(
        self,
        model: BlockModel,
        block: int,
        batch: Batch,
        *,
        handed: Handed = None,
        ranges: range | None = None,
        draws: Draws | None = None,
        settling: bool = False,
    ) -> StepOutput:
        network, labels = _diffusion(model), batch["labels"]
        clean, partition = batch["pixel_values"], network.partition
        source = drawn_for(batch, draws).generator
        sigma = partition.sample(block if ranges is None else ranges, len(labels), generator=source)
        dropped = uniform(len(labels), generator=source) < self.label_dropout
        labels = labels.masked_fill(dropped, network.num_classes)
        noisy = add_noise(clean, sigma, generator=source)
        output = network.denoiser(block)({"noisy_target": noisy, "labels": labels}, sigma)
        return StepOutput(weighted_error(output.estimate, clean, sigma).mean())

    @torch.no_grad()
    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """`validation_loss`: EDM-weighted error over the training distribution of noise levels, with its standard error
        over images; with several blocks also `loss_block_<i>`, over each block's own range.

        Levels are stratified and their noise is seeded: with equal batches, every network meets the same noisy images.
        """
        network = _diffusion(model)
        count, partition = self.levels_per_image, network.partition
        blocks = partition.num_blocks
        per_image: list[Tensor] = []
        per_block: list[list[Tensor]] = [[] for _ in range(blocks)]
        for index, batch in enumerate(all_beside(model, batches)):
            clean, labels = batch["pixel_values"], batch["labels"]
            source = generator(index, clean.device)
            strata = torch.arange(count, device=clean.device)
            places = (strata + uniform(len(labels), count, generator=source)) / count
            errors = torch.empty(len(labels), count, device=clean.device)
            for column in range(count):
                sigma = partition.levels.level(wide(places[:, column]))
                owners = partition.block_of(sigma)
                noisy = add_noise(clean, sigma.float(), generator=source)
                for block in owners.unique().tolist():
                    mine = owners == block
                    level = sigma.float()[mine]
                    inputs = {"noisy_target": noisy[mine], "labels": labels[mine]}
                    found = weighted_error(network.denoiser(block)(inputs, level).estimate, clean[mine], level)
                    errors[mine, column] = found
                    per_block[block].append(found.cpu())
            per_image.append(errors.mean(1).cpu())
        metrics = {"validation_loss": mean_with_error(torch.cat(per_image))}
        if blocks > 1:
            metrics |= {
                f"loss_block_{i}": mean_with_error(torch.cat(found)) for i, found in enumerate(per_block) if found
            }
        return metrics

    def levels(self, model: ImageBlocks | ImageNetwork) -> list[float]:
        """The grid of a whole chain, highest first; it ends with 0."""
        return [*GRIDS[self.grid](model.partition.levels, self.sampling_steps), 0.0]

    @torch.no_grad()
    def sample(
        self,
        model: ImageBlocks | ImageNetwork,
        labels: Tensor,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Callable[[int, float, Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """Images of the given classes [N] (num_classes = the null class) -> [N, channels, height, width], unclipped.

        One block runs per denoiser call, chosen by `partition.block_of`. The images depend on `seed`, `labels` and the
        kind of device alone.

        Args:
            device: where to sample; None = where the model's first parameter is.
            watch: called as watch(block, level, z, estimate) after every denoiser call.
        """
        device = device or next(iter(model.parameters())).device
        labels = labels.to(device)
        null = torch.full_like(labels, model.num_classes)

        def denoise(z: Tensor, level: float) -> DenoiserOutput:
            block = int(model.partition.block_of(torch.tensor(level, dtype=torch.float64)))
            sigma = torch.full((len(z),), level, device=device)
            denoiser = model.denoiser(block)
            if self.guidance == 1.0:
                output = denoiser({"noisy_target": z, "labels": labels}, sigma)
            else:
                twice = {"noisy_target": torch.cat([z, z]), "labels": torch.cat([labels, null])}
                both = denoiser(twice, torch.cat([sigma, sigma]))
                conditional, free = both.estimate.chunk(2)
                output = both._replace(estimate=torch.lerp(free, conditional, self.guidance))
            if watch is not None:
                watch(block, level, z, output.estimate)
            return output

        levels, source = self.levels(model), generator(seed, device)
        z = normal_like(torch.empty(len(labels), *model.sample_shape, device=device), source) * levels[0]
        return SAMPLERS[self.sampler](denoise, z, levels, generator=source)

    # ------------------------------------------------------------------ what a finished run is asked

    def check_data(self, split: Dataset) -> None:
        if self.num_samples:
            images.check(self.num_samples, self.inception, split)

    def measure(self, trained: TrainedOnImages, split: ImageData, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """What samples are like beside the images of `split` (`evaluation.images.of_samples`), and how likely those
        images are, unless they are latents."""
        found = dict(metrics)
        if self.num_samples:
            found |= images.of_samples(
                lambda labels, seed: (part.images for part in self.generated(trained, labels, seed=seed)),
                self.num_samples,
                split,
                trained.data,
                trained.config,
                sets=self.evaluations,
                inception=self.inception,
                device=trained.device,
            )
        if not trained.config.vae:
            found |= images.bits_per_dimension(_diffusion(trained.model), split, trained.device)
        return found

    def generated(
        self, trained: TrainedOnImages, labels: Tensor, *, seed: int = 0, quiet: bool = False
    ) -> Iterator[Generated]:
        """Images of the given classes [N] in parts, with a progress bar, for sets that do not fit memory."""
        from rich.console import Console
        from rich.progress import track

        model = _diffusion(trained.model)
        passes: list[int] = []

        def count(block: int, level: float, z: Tensor, estimate: Tensor) -> None:
            passes.append(len(model.block(block).layers) * len(z) * (1 if self.guidance == 1.0 else 2))

        decode, starts = _decoder(trained), range(0, len(labels), AT_ONCE)
        quiet, console = quiet or len(starts) < 2, Console(stderr=True)
        for start in track(starts, "sampling", disable=quiet, transient=True, console=console):
            began, part = time.perf_counter(), labels[start : start + AT_ONCE]
            passes.clear()
            found = self.sample(model, part, seed=derive(seed, "samples", start), device=trained.device, watch=count)
            made = Images(to_pixels(decode(found)), part)
            yield Generated(made, sum(passes), time.perf_counter() - began)

    def generate(self, trained: TrainedOnImages, labels: Tensor, *, seed: int = 0, quiet: bool = False) -> Generated:
        """The same at once."""
        parts = list(self.generated(trained, labels, seed=seed, quiet=quiet))
        return Generated(
            Images(torch.cat([part.images.images for part in parts]), labels),
            layer_evaluations=sum(part.layer_evaluations for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    def sampling(self, model: BlockModel) -> Sampling:
        return Sampling(
            "images",
            ("class", "seed"),
            {"guidance": "guidance", "grid": "grid", "steps": "sampling_steps", "sampler": "sampler"},
            file="samples.png",
            endings={".png": "a grid", ".npz": "the samples"},
        )

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        return ("num_samples", "evaluations", "sampler", "sampling_steps", "grid", "guidance", "inception")

    def make(self, trained: TrainedOnImages, asked: Asked) -> Made:
        """Images of the classes in turn. Raises UserError for a class that does not exist."""
        names = trained.data.classes
        classes = class_numbers(asked.classes, names) if asked.classes else range(len(names))
        for index in classes:
            if not 0 <= index < len(names):
                raise UserError(
                    f"class {index} does not exist: classes are 0 to {len(names) - 1} ({', '.join(names[:12])})"
                )
        chosen = torch.tensor(list(classes))
        made = self.generate(trained, chosen[torch.arange(asked.num) % len(chosen)], seed=asked.seed)
        found = {
            "num": asked.num,
            "classes": [names[label] for label in made.images.labels.tolist()],
            "sampler": self.sampler,
            "steps": self.sampling_steps,
            "guidance": self.guidance,
            "seed": asked.seed,
            "layer_evaluations_per_image": made.layer_evaluations / asked.num,
            "seconds": round(made.seconds, 3),
        }
        return Made(found, f"{asked.num} images in {made.seconds:.1f} s", made.images)

    def figures(self, trained: TrainedOnImages) -> list[Figure]:
        """All classes in turn, and how some images come out of noise."""
        model, labels = _diffusion(trained.model), torch.arange(SHOWN) % len(trained.data.classes)
        steps: list[Stage] = []
        decode = _decoder(trained)

        def single(found: Tensor) -> list[np.ndarray]:
            return [grid(image[None]) for image in to_pixels(decode(found))]

        def watch(block: int, level: float, z: Tensor, estimate: Tensor) -> None:
            steps.append(Stage(block, level, single(z[:PATHS] / (1 + level))))

        made = self.generate(trained, labels, quiet=True)
        end = self.sample(model, labels[:PATHS], seed=derive(0, "samples", 0), device=trained.device, watch=watch)
        chosen = [steps[round(i * (len(steps) - 1) / (PATH_STEPS - 2))] for i in range(PATH_STEPS - 1)]
        stages = [*chosen, Stage(chosen[-1].block, 0.0, single(end))]
        return [
            Figure("Generated images, one class after another", Picture(grid(made.images.images, columns=16))),
            Figure(
                "From noise to image: above every step the block that runs and its noise level",
                Stages(stages, model.num_blocks),
            ),
        ]


def _decoder(trained: TrainedOnImages) -> Callable[[Tensor], Tensor]:
    """What the network makes -> images: decoded where it makes latents."""
    if not trained.config.vae:
        return lambda found: found
    decoder = Autoencoder(trained.config, str(trained.device))
    return lambda latents: decoder.decode(latents.cpu())


_NUMBER = re.compile(r"-?[0-9]{1,9}")


def class_numbers(text: str, names: Sequence[str]) -> list[int]:
    """`3`, `cat` or `3,cat` -> numbers of classes. A name that looks like a number is a number. Raises UserError for an
    unknown name."""
    found = []
    for part in map(str.strip, text.split(",")):
        if not _NUMBER.fullmatch(part) and part not in names:
            raise UserError(f"unknown class {part!r}{nearest(part, names)}")
        found.append(int(part) if _NUMBER.fullmatch(part) else names.index(part))
    return found


def _diffusion(model: BlockModel) -> ImageBlocks | ImageNetwork:
    if not isinstance(model, ImageBlocks | ImageNetwork):
        raise UserError(f"the task image-generation needs a diffusion network; got {type(model).__name__}")
    return model
