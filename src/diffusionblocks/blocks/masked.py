"""Denoisers of masked tokens: y are the tokens of a text, z the same with some of them hidden behind a mask ([MD4],
[DB] appendix D; Sahoo et al. 2024, arXiv 2406.07524).

A network that reads the text in both directions predicts what the mask hides. Block b owns the levels at which a share
u of the tokens is masked, u between b's borders, so sampling runs one block per step. With u uniform in [0, 1],

    -log p(y) <= E_u [ (1/u) * sum over masked positions of cross-entropy ]        [nats per text]

whatever the schedule alpha(t) = 1 - u (change of variables in [MD4] eq. 4), and the integral splits into one share per
block.

Shapes: N batch, T positions, D width, V tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.model import Block, Denoiser, DiffusionBlocksModel, WholeDenoiser
from diffusionblocks.blocks.saving import save_tensors
from diffusionblocks.errors import UserError
from diffusionblocks.networks.attention import both_ways
from diffusionblocks.networks.conditioning import ConditionedLayer, LevelEmbedding
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.networks.readout import IGNORED, TokenReadout, without
from diffusionblocks.seeds import uniform
from diffusionblocks.system.files import write_json
from diffusionblocks.theory.noise import MaskingSchedule
from diffusionblocks.theory.sampler import DenoiserOutput


class Masked(NamedTuple):
    """tokens: with the mask at hidden ones [N, T]. labels: the hidden tokens, `IGNORED` elsewhere [N, T]. weights: [N],
    the sum of a text's cross-entropies times its weight is an estimate of the bound at this level, in nats per
    token."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor


def hide(
    tokens: Tensor,
    shares: Tensor,
    mask_id: int,
    *,
    real: Tensor | None = None,
    exact: bool = True,
    generator: torch.Generator | None = None,
) -> Masked:
    """Masks the share u of each text.

    Args:
        tokens: [N, T]. shares: u [N]. real: 0 at padding [N, T], which is never masked; None = no padding.
        exact: exactly u of a text's tokens (rounded up, at least one), at random places; else every token independently
            with probability u ([MD4] eq. 1).

    Given how many tokens are masked, their places are uniform in both. With u uniform, the bound is the mean over
    n = 1..T of the mean cross-entropy over n masked tokens: integrating the binomial counts of independent masks over u
    comes to just that (the bound of Uria et al. 2014, arXiv 1310.1757, on texts in any order). Exact counts save the
    variance of 1/u and of the count.
    """
    scores = uniform(*tokens.shape, generator=generator, device=tokens.device)
    present = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
    lengths = present.sum(1)
    if exact:
        counts = (shares * lengths).ceil().clamp(min=1)
        ranks = scores.masked_fill(~present, 2).argsort(1).argsort(1)
        masked, weights = (ranks < counts[:, None]) & present, 1 / counts
    else:
        masked, weights = (scores < shares[:, None]) & present, 1 / (shares * lengths).clamp(min=1e-6)
    return Masked(tokens.masked_fill(masked, mask_id), tokens.masked_fill(~masked, IGNORED), weights)


class Answers:
    """What a denoiser of masked tokens can be asked, whoever computes its hidden states."""

    mask_id: int

    def hidden(self, batch: Batch, level: Tensor) -> Tensor:
        """Last hidden states [N, T, D] for the tokens `batch["noisy_target"]` [N, T] at level t [N]."""
        raise NotImplementedError

    def head(self) -> TokenReadout:
        raise NotImplementedError

    def loss(self, batch: Batch, level: Tensor, labels: Tensor, weights: Tensor, most: int) -> Tensor:
        """Sum of the cross-entropies at the positions whose labels [N, T] are not `IGNORED`, each times the weight [N]
        of its text.

        most: not more of these positions than so many, which the readout works at: a size that is known without waiting
        for the device to count them. Those it lacks are made up of others, which add nothing.
        """
        hidden, labels = self.hidden(batch, level).flatten(0, 1), labels.flatten()
        first = (labels == IGNORED).argsort(stable=True)[:most]
        each = weights.repeat_interleave(len(labels) // len(weights))
        return self.head()(hidden[first], labels[first], self.mask_id, weights=each[first])

    def each_loss(self, batch: Batch, level: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies in nats [N, T], 0 where labels are `IGNORED`. The readout works at the other positions
        alone."""
        hidden, hides = self.hidden(batch, level), labels != IGNORED
        losses = self.head()(hidden[hides], labels[hides], self.mask_id)
        return losses.new_zeros(labels.shape).masked_scatter(hides, losses)

    def logits_at(self, batch: Batch, level: Tensor, where: Tensor) -> Tensor:
        """Logits of the tokens at the M positions `where` [N, T] is true: [M, V]."""
        return self.head()(self.hidden(batch, level)[where], None, self.mask_id).float()

    def output(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        """Everything at once, see `MaskedDenoiser`."""
        clean, noisy = batch.get("input_ids"), batch.get("noisy_target")
        labels = weights = None
        if noisy is None:
            if clean is None:
                raise UserError("a denoiser's batch needs 'noisy_target' or 'input_ids'; got " + ", ".join(batch))
            noisy, labels, weights = hide(clean, self.shares(level), self.mask_id, real=batch.get("attention_mask"))
        elif clean is not None:
            labels = clean.masked_fill(noisy != self.mask_id, IGNORED)
            weights = 1 / (labels != IGNORED).sum(1).clamp(min=1)
        raw = self.head()(self.hidden({**batch, "noisy_target": noisy}, level))
        logits = without(raw.float(), self.mask_id)
        estimate = torch.where(noisy == self.mask_id, logits.argmax(-1), noisy)
        if labels is None or weights is None:
            return DenoiserOutput(estimate, raw, logits)
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return DenoiserOutput(estimate, raw, logits, loss=(losses.reshape(labels.shape).sum(1) * weights).mean())

    def shares(self, level: Tensor) -> Tensor:
        """u = 1 - alpha(t) [N]."""
        raise NotImplementedError


def condition(level: Tensor) -> Tensor:
    """t [N] in [0, 1] -> what `LevelEmbedding` reads, in a range like that of ln(sigma) / 4."""
    return 2 * level - 1


def read_batch(batch: Batch) -> Mapping[str, Tensor]:
    """The batch as the stem reads it: the tokens with their mask."""
    return {**batch, "input_ids": batch["noisy_target"]}


class MaskedBlock(Block):
    """A block with an embedding of the level, if its layers see one."""

    def __init__(self, layers: list[nn.Module], *, level: LevelEmbedding | None, **parts: Any) -> None:
        super().__init__(layers, **parts)
        self.level = level

    def forward(self, use: str, *arguments: Any) -> Tensor:
        """use `denoise`: (hidden, c_noise, view) -> hidden."""
        if use == "denoise":
            hidden, c_noise, view = arguments
            return self.run(self.layers, hidden, None if self.level is None else self.level(c_noise), view)
        return super().forward(use, *arguments)


class MaskedDenoiser(Denoiser, Answers):
    """forward(batch, level) -> DenoiserOutput with logits [N, T, V] and estimate [N, T], the likeliest tokens.

    batch: `noisy_target` [N, T], the tokens with the mask at hidden ones, and optionally `attention_mask` (0 = padding)
    and `segments` (see `attention.both_ways`). With the clean tokens `input_ids` [N, T] there is a loss, in nats per
    token; without `noisy_target` the masks are drawn here. level: t [N].
    """

    def __init__(
        self, index: int, block: Block, shared: nn.ModuleDict, mask_id: int, schedule: MaskingSchedule
    ) -> None:
        super().__init__(index, block, shared)
        self.mask_id, self.schedule = mask_id, schedule

    def forward(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        return self.output(batch, level)

    def hidden(self, batch: Batch, level: Tensor) -> Tensor:
        read = read_batch(batch)
        hidden = self.part("stem")(read)
        return self.block("denoise", hidden, condition(level), both_ways(read, hidden))

    def head(self) -> TokenReadout:
        return self.part("readout")

    def shares(self, level: Tensor) -> Tensor:
        return self.schedule.mass(level)


class MaskedBlocks(DiffusionBlocksModel):
    """Blocks that unmask tokens, each with a range of levels."""

    def __init__(self, parts: Parts, config: BlocksConfig, source: Any = None) -> None:
        self.mask_id = mask_of(parts)
        super().__init__(parts, config, source)

    def _levels(self, parts: Parts) -> MaskingSchedule:
        return self.config.masking()

    def _build(self, parts: Parts) -> Iterator[Block]:
        copies = self.config.shared == "copies"
        if not copies:
            self.shared.update({"stem": parts.stem, "readout": parts.readout})
        for span in self.layers:
            # Copied together: where they share a parameter, so do the copies.
            stem, readout = copy.deepcopy((parts.stem, parts.readout)) if copies else (None, None)
            layers, level = conditioned([parts.layers[i] for i in span], parts, self.config.condition_width)
            yield MaskedBlock(layers, level=level, stem=stem, readout=readout)

    def _denoiser(self, index: int) -> MaskedDenoiser:
        return MaskedDenoiser(index, self.block(index), self.shared, self.mask_id, self.config.masking())


def conditioned(layers: list[nn.Module], parts: Parts, width: int) -> tuple[list[nn.Module], LevelEmbedding | None]:
    """Layers that see the level through their norms, and its embedding; as they are where width is 0."""
    if not width:
        return layers, None
    return [ConditionedLayer(layer, parts.layer_norms, parts.width, width) for layer in layers], LevelEmbedding(width)


def mask_of(parts: Parts) -> int:
    """Id of the mask token, from the network's config. Raises UserError when it has none, or one that does not fit."""
    found = getattr(getattr(parts.network, "config", None), "mask_token_id", None)
    if found is None:
        raise UserError(
            "masked diffusion needs a mask token: set model.config.mask_token_id to the tokenizer's mask_token_id (and "
            "model.resize_token_embeddings(...) first, where the tokenizer had none)"
        )
    if not 0 <= found < parts.num_classes:
        raise UserError(f"the mask token {found} is not among the network's {parts.num_classes} tokens")
    return int(found)


class MaskedNetwork(WholeDenoiser):
    """The whole network as one denoiser of masked tokens (`end-to-end`, `shallow`, `lora`, ...).

    Args:
        condition_width: C of layers that see the level; 0 = they do not, and what is saved is an ordinary network.
    """

    def __init__(
        self, parts: Parts, num_layers: int | None = None, *, condition_width: int = 0, **options: Any
    ) -> None:
        self.mask_id = mask_of(parts)
        super().__init__(parts, num_layers, **options)
        frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in self.block(0).layers]
        layers, level = conditioned(list(self.block(0).layers), parts, condition_width)
        for layer, stays in zip(layers, frozen, strict=True):
            if stays:
                layer.requires_grad_(False)
        self.blocks[0] = MaskedBlock(layers, level=level, stem=parts.stem, readout=parts.readout)
        self._denoiser = (_MaskedNetworkDenoiser(self),)

    def denoiser(self, index: int) -> _MaskedNetworkDenoiser:
        self.block(index)
        return self._denoiser[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary transformers network, and beside it how it is to be called (denoiser.json).

        Layers that see the level have their modulation and its embedding in conditioning.safetensors.
        """
        super().save_pretrained(folder)
        block = self.block(0)
        extra = {
            name: tensor.contiguous().cpu()
            for name, tensor in block.state_dict().items()
            if ".modulation." in name or name.startswith("level.")
        }
        if extra:
            save_tensors(extra, Path(folder) / "conditioning.safetensors", {"format": "pt"})
        levels = self.partition.levels
        assert isinstance(levels, MaskingSchedule)
        use = {
            "objective": "masked diffusion",
            "attention": "both ways",
            "mask_token_id": self.mask_id,
            "schedule": levels.kind,
            "conditioned": bool(extra),
        }
        write_json(Path(folder) / "denoiser.json", use)

    def _weights(self, network: Any) -> dict[str, Tensor] | None:
        """Under the names that the network had before its norms were wrapped."""
        if not any(isinstance(layer, ConditionedLayer) for layer in self.block(0).layers):
            return None
        whole = network.state_dict()
        wrapped = {name.rpartition(".modulation.")[0] for name in whole if ".modulation." in name}
        return {
            name.replace(".norm.", ".") if any(name.startswith(f"{path}.norm.") for path in wrapped) else name: tensor
            for name, tensor in whole.items()
            if ".modulation." not in name
        }


class _MaskedNetworkDenoiser(Answers):
    """A whole network asked as a denoiser. Not a module: its parameters are registered through the network."""

    def __init__(self, model: MaskedNetwork) -> None:
        self.model, self.mask_id = model, model.mask_id

    def __call__(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        return self.output(batch, level)

    def hidden(self, batch: Batch, level: Tensor) -> Tensor:
        read = read_batch(batch)
        hidden = self.model.stem(read)
        return self.model.block(0)("denoise", hidden, condition(level), both_ways(read, hidden))

    def head(self) -> TokenReadout:
        readout = self.model.readout
        assert isinstance(readout, TokenReadout)
        return readout

    def shares(self, level: Tensor) -> Tensor:
        return self.model.partition.levels.mass(level)
