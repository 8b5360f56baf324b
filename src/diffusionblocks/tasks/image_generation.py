"""Image generation: y = the image (or its latent), condition = its class ([DB] section 5.2, [EDM]).

Every method trains with the same loss; a whole network is one denoiser of all noise levels, blocks have a range each.

Shapes: N batch, image [channels, height, width].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusionblocks.blocks.images import ImageBlocks, ImageNetwork, weighted_error
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.options import check_options, option
from diffusionblocks.seeds import Draws, generator, normal_like, uniform
from diffusionblocks.system.devices import wide
from diffusionblocks.theory.grids import GRIDS
from diffusionblocks.theory.ode import SAMPLERS
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import add_noise
from diffusionblocks.training.task import Metric, StepOutput, Task, all_beside, drawn_for, mean_with_error


@dataclass(kw_only=True)
class ImageGeneration(Task):
    """Objective, evaluation and sampling of a class-conditional diffusion model.

    Args:
        kind: the name of this task in a recipe.
        label_dropout: share of training samples whose class is replaced by the null class, for guidance.
        sampler: `euler` ([DB]), `heun`, `dpm-solver++` or `churn`. sampling_steps: of it. grid: `rho` ([EDM], rho = 7)
            or `equal-mass`.
        guidance: classifier-free guidance scale; 1 = none ([DB] has 2.0). Other values run every step twice.
        num_samples: images that the finished run makes for its metrics; 0 = none are made. evaluations: how many such
            sets; the nearest to the real images counts (the protocol of FID: 3).
        levels_per_image: noise levels at which validation measures every image.
        inception: TorchScript file of the original Inception network, for fid and kid; empty = a small feature network
            trained on the recipe's own images, reported as feature_distance.
    """

    target: ClassVar = "image"
    data: ClassVar = DataConfig
    by_block: ClassVar = True
    compared_alike: ClassVar = ("sampler", "sampling_steps", "grid", "guidance", "label_dropout")

    kind: str = option("image-generation", choices=("image-generation",))
    label_dropout: float = option(0.1, least=0, most=1)
    sampler: str = option("dpm-solver++", choices=tuple(SAMPLERS))
    sampling_steps: int = option(20, least=1)
    grid: str = option("rho", choices=tuple(GRIDS))
    guidance: float = option(1.0, least=0)
    num_samples: int = option(5000, least=0)
    evaluations: int = option(1, least=1)
    levels_per_image: int = option(4, least=1)
    inception: str = ""

    def __post_init__(self) -> None:
        check_options("task", self)
        if self.guidance != 1.0 and self.label_dropout == 0:
            raise UserError(
                "guidance needs a null class, which training with task.label_dropout 0 never shows the network"
            )

    def step(
        self, model: BlockModel, block: int, batch: Batch, *, ranges: range | None = None, draws: Draws | None = None
    ) -> StepOutput:
        network, labels = _diffusion(model), batch["labels"]
        clean, partition = batch["pixel_values"], network.partition
        source = drawn_for(batch, draws).generator
        sigma = partition.sample(block if ranges is None else ranges, len(labels), generator=source)
        dropped = uniform(len(labels), generator=source) < self.label_dropout
        labels = labels.masked_fill(dropped, network.num_classes)
        noisy = add_noise(clean, sigma, generator=source)
        output = network.denoiser(block)({"noisy_target": noisy, "labels": labels}, sigma)
        return StepOutput(weighted_error(output.estimate, clean, sigma).mean(), None)

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


def _diffusion(model: Any) -> Any:
    if not isinstance(model, ImageBlocks | ImageNetwork):
        raise UserError(f"the task image-generation needs a diffusion network; got {type(model).__name__}")
    return model
