"""Denoisers of labels: x is an image or another clean input, y the embedding of its label ([DB] section 5.1).

Context (what a block reads of the clean input x):
    input     every block reads the stem's output and the noisy target enters at its first token ([DB]).
    features  block b starts from the clean stream that leaves block b-1, detached; no gradient crosses the
              border. The noisy target enters after the block's trunk: in its head layers, if any, and in the
              readout.

Shapes: N batch, T positions, D width, V classes, C condition width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.model import Block, Denoiser, DiffusionBlocksModel
from diffusionblocks.errors import UserError
from diffusionblocks.networks.conditioning import ConditionedLayer, LevelEmbedding
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.theory.noise import LevelDistribution
from diffusionblocks.theory.precondition import coefficients
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import CategoricalTarget, add_noise, label_table


class TargetEntry(nn.Module):
    """Puts the scaled noisy target c_in z [N, D] into the first token of the stream [N, T, D]."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "add":
            self.projection = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.projection.weight)

    def forward(self, hidden: Tensor, scaled_target: Tensor, first_position: Tensor | None) -> Tensor:
        if self.kind == "none":
            return hidden
        token = scaled_target.to(hidden.dtype)[:, None]
        if self.kind == "add":
            token = hidden[:, :1] + self.projection(token)
        elif first_position is not None:
            token = token + first_position.to(hidden)
        return torch.cat([token, hidden[:, 1:]], dim=1)


class LabelBlock(Block):
    """A block with a place for the noisy target.

    `level` embeds the noise level for conditioned layers; a block without it runs its trunk unconditioned. `head`:
    layers between trunk and readout that are not handed on.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        stem: nn.Module | None = None,
        level: LevelEmbedding | None = None,
        entry: TargetEntry | None = None,
        head: list[nn.Module] | None = None,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__(layers, stem=stem, readout=readout)
        self.level, self.entry = level, entry
        self.head = nn.ModuleList(head or [])

    def denoise(
        self, hidden: Tensor, scaled_target: Tensor, c_noise: Tensor, readout: nn.Module, first: Tensor | None
    ) -> Tensor:
        """Input context: stem output [N, T, D] -> raw logits [N, V]."""
        assert self.entry is not None
        hidden = self.entry(hidden, scaled_target, first)
        return readout(self.run(self.layers, hidden, self._condition(c_noise)))

    def _condition(self, c_noise: Tensor) -> Tensor | None:
        return None if self.level is None else self.level(c_noise)

    def read(self, trunk: Tensor, scaled_target: Tensor, c_noise: Tensor, readout: nn.Module) -> Tensor:
        """Features context: trunk output [N, T, D] -> raw logits [N, V] through the head, if there is one."""
        if self.entry is not None:
            trunk = self.run(self.head, self.entry(trunk, scaled_target, None), self._condition(c_noise))
        return readout(trunk)

    def forward(self, use: str, *arguments: Any) -> Tensor:
        if use == "denoise":
            return self.denoise(*arguments)
        if use == "read":
            return self.read(*arguments)
        return super().forward(use, *arguments)


class LabelDenoiser(Denoiser):
    """forward(batch, level) reads from `batch` the stem's inputs, and one of `noisy_target` [N, D] and `labels` [N]
    (then z = table[labels] + level * eps is drawn here). In features context `context` [N, T, D], the detached output
    of the block before, is needed for every block but the first: `DiffusionBlocksModel.context` computes it.
    """

    def __init__(self, index: int, block: Block, shared: nn.ModuleDict, config: BlocksConfig) -> None:
        super().__init__(index, block, shared)
        self.config = config

    @property
    def target(self) -> CategoricalTarget:
        target = self.shared["target"]
        assert isinstance(target, CategoricalTarget)
        return target

    def forward(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        """level: sigma [N]. Raises UserError when the batch lacks what this block reads."""
        noisy = batch.get("noisy_target")
        if noisy is None:
            if "labels" not in batch:
                raise UserError("a denoiser's batch needs 'noisy_target' or 'labels'; got " + ", ".join(batch))
            noisy = add_noise(self.target.clean(batch["labels"]), level)
        c = coefficients(level.float())
        scaled = c.input[:, None] * noisy
        if self.config.context == "input":
            stem, readout = self.part("stem"), self.part("readout")
            raw = self.block("denoise", stem(batch), scaled, c.noise, readout, getattr(stem, "first_position", None))
            context = None
        else:
            context = self.trunk(batch)
            raw = self.block("read", context, scaled, c.noise, self.part("readout"))
        logits = self.target.logits(raw, noisy, level)
        loss = self.target.losses(logits, batch["labels"]).mean() if "labels" in batch else None
        return DenoiserOutput(self.target.estimate(logits), raw, logits, context, loss)

    def trunk(self, batch: Batch) -> Tensor:
        """Features context: the clean stream that leaves this block [N, T, D]."""
        return self.block("trunk", self.entering(batch) if self.index else self.part("stem")(batch))


class LabelBlocks(DiffusionBlocksModel):
    """Blocks that denoise the embedding of a label."""

    def _levels(self, parts: Parts) -> LevelDistribution:
        self.shared["target"] = target = categorical_target(parts, self.config)
        return self.config.distribution(target.rows.detach())

    def _denoiser(self, index: int) -> LabelDenoiser:
        return LabelDenoiser(index, self.block(index), self.shared, self.config)

    def _build(self, parts: Parts) -> Iterator[Block]:
        return self._input_blocks(parts) if self.config.context == "input" else self._feature_blocks(parts)

    def _conditioned(self, layer: nn.Module, parts: Parts) -> nn.Module:
        if not self.config.condition_width:
            return layer
        return ConditionedLayer(layer, parts.layer_norms, parts.width, self.config.condition_width)

    def _level(self) -> LevelEmbedding | None:
        return LevelEmbedding(self.config.condition_width) if self.config.condition_width else None

    def _input_blocks(self, parts: Parts) -> Iterator[Block]:
        copies = self.config.shared == "copies"
        if self.config.target_entry == "replace":
            parts.stem.drop_first_token()
        if not copies:
            self.shared.update({"stem": parts.stem, "readout": parts.readout})
        for span in self.layers:
            yield LabelBlock(
                [self._conditioned(parts.layers[i], parts) for i in span],
                stem=copy.deepcopy(parts.stem) if copies else None,
                level=self._level(),
                entry=TargetEntry(self.config.target_entry, parts.width),
                readout=copy.deepcopy(parts.readout) if copies else None,
            )

    def _feature_blocks(self, parts: Parts) -> Iterator[Block]:
        for index, span in enumerate(self.layers):
            head = [fresh_copy(parts.layers[span[-1]]) for _ in range(self.config.head_layers)]
            yield LabelBlock(
                [parts.layers[i] for i in span],
                stem=parts.stem if index == 0 else None,
                level=self._level() if head else None,
                entry=TargetEntry(self.config.target_entry, parts.width) if head else None,
                head=[self._conditioned(layer, parts) for layer in head],
                readout=copy.deepcopy(parts.readout),
            )


def categorical_target(parts: Parts, config: BlocksConfig) -> CategoricalTarget:
    """The embeddings of a network's classes or tokens, common to all its blocks."""
    table = label_table(parts.num_classes, parts.width)
    return CategoricalTarget(table, trainable=config.target_table == "trained", bayes=config.readout == "bayes")


def fresh_copy(layer: nn.Module) -> nn.Module:
    """A copy of `layer` with weights drawn anew: normal(0, 0.02) matrices, zero biases, norms left as they are."""
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 2:
            nn.init.trunc_normal_(weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return layer
