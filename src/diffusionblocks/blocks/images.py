"""Denoisers of images (or of latents): y is the image itself, the condition its class ([DB] section 5.2, [EDM]).

The noisy image is what the network reads, so every block has a stem and a readout of its own, and depth needs no
detour: a block of L/B layers denoises its range of noise levels, and sampling runs one block per step.

Shapes: N batch, image [channels, height, width].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.model import Block, Denoiser, DiffusionBlocksModel, WholeDenoiser
from diffusionblocks.errors import UserError
from diffusionblocks.networks.dit import ImageCondition
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.system.files import write_json
from diffusionblocks.theory.noise import LevelDistribution
from diffusionblocks.theory.precondition import SIGMA_DATA, coefficients, edm_weight
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import add_noise


def timestep(sigma: Tensor) -> Tensor:
    """sigma [N] -> [N] in the units that networks with a timestep expect: log sigma, 0 at 0.002 and 1000 at 80."""
    return 1000 * (sigma.float() / 0.002).log() / math.log(80 / 0.002)


Call = Callable[[Tensor, ImageCondition], Tensor]


def denoise(call: Call, batch: Batch, level: Tensor) -> DenoiserOutput:
    """D(z) = c_skip z + c_out F(c_in z) ([EDM] eq. 7) with the network `call` as F.

    Args:
        batch: `labels` [N] (the null class for unconditional), and one of `noisy_target` and `pixel_values`
            [N, channels, height, width] (then z = pixel_values + level * eps is drawn here).
        level: sigma [N].

    Raises UserError when the batch lacks what is needed.
    """
    if "labels" not in batch:
        raise UserError("an image denoiser's batch needs 'labels' (the null class where there is none)")
    clean, noisy = batch.get("pixel_values"), batch.get("noisy_target")
    if noisy is None:
        if clean is None:
            raise UserError("a denoiser's batch needs 'noisy_target' or 'pixel_values'; got " + ", ".join(batch))
        noisy = add_noise(clean, level)
    c = coefficients(level.float()[:, None, None, None])
    raw = call(c.input * noisy, ImageCondition(timestep(level), batch["labels"])).float()
    estimate = c.skip * noisy + c.out * raw
    loss = None if clean is None else weighted_error(estimate, clean, level).mean()
    return DenoiserOutput(estimate, raw, loss=loss)


def weighted_error(estimate: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """EDM-weighted mean square error per image [N]: 1 for a network that only knows the data's variance ([EDM]
    eq. 2, 8)."""
    return edm_weight(level.float()) * (estimate - clean.float()).square().mean((1, 2, 3))


class ImageDenoiser(Denoiser):
    """forward(batch, level): see `denoise`."""

    def forward(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        return denoise(self._call, batch, level)

    def _call(self, image: Tensor, condition: ImageCondition) -> Tensor:
        hidden = self.block("trunk", self.part("stem")(image), condition)
        return self.part("readout")(hidden, condition)


class ImageBlocks(DiffusionBlocksModel):
    """Blocks that denoise images, each with a noise range, a stem and a readout of its own."""

    def __init__(self, parts: Parts, config: BlocksConfig, source: Any = None) -> None:
        super().__init__(parts, config, source)
        self.sample_shape, self.num_classes = parts.sample_shape, parts.num_classes

    def _levels(self, parts: Parts) -> LevelDistribution:
        return self.config.distribution()

    def _build(self, parts: Parts) -> Iterator[Block]:
        copies = self.config.shared == "copies"
        if not copies:
            self.shared.update({"stem": parts.stem, "readout": parts.readout.alone()})
        for span in self.layers:
            layers = [parts.layers[i] for i in span]
            yield Block(
                layers,
                stem=copy.deepcopy(parts.stem) if copies else None,
                readout=parts.readout.alone(layers[0]) if copies else None,
            )

    def _denoiser(self, index: int) -> ImageDenoiser:
        return ImageDenoiser(index, self.block(index), self.shared)


class ImageNetwork(WholeDenoiser):
    """The ordinary diffusion transformer: one denoiser for all noise levels (`end-to-end`, `shallow`, `lora`, ...)."""

    def __init__(self, parts: Parts, num_layers: int | None = None, **options: Any) -> None:
        super().__init__(parts, num_layers, **options)
        self.sample_shape, self.num_classes = parts.sample_shape, parts.num_classes
        self._denoiser = (_ImageNetworkDenoiser(self),)

    def denoiser(self, index: int) -> _ImageNetworkDenoiser:
        self.block(index)
        return self._denoiser[0]

    def call(self, image: Tensor, condition: ImageCondition) -> Tensor:
        return self.readout(self.block(0)("trunk", self.stem(image), condition), condition)

    def _record_depth(self, network: Any, depth: int) -> None:
        network.register_to_config(**{self._depth_key: depth})

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary diffusers network, and beside it how it is to be called (denoiser.json)."""
        super().save_pretrained(folder)
        levels = self.partition.levels
        use = {
            "preconditioning": "edm",
            "sigma_data": SIGMA_DATA,
            "sigma_min": levels.lowest,
            "sigma_max": levels.highest,
            "timestep": "1000 * log(sigma / 0.002) / log(80 / 0.002)",
            "null_class": self.num_classes,
        }
        write_json(Path(folder) / "denoiser.json", use)


class _ImageNetworkDenoiser:
    """A whole network called as a denoiser. Not a module: its parameters are registered through the network."""

    def __init__(self, model: ImageNetwork) -> None:
        self.model = model

    def __call__(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        return denoise(self.model.call, batch, level)
