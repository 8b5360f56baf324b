"""Denoisers of the next token: y is the embedding of a token, x the tokens before it ([DB] section 5.4).

Row r of a text of T tokens predicts token r + 1 from the clean tokens 0 to r and from z, the noisy embedding of token
r + 1. The first token has no row. What reads z (`BlocksConfig.target_entry`):

    replace  layers: the R = T - 1 noisy targets stand beside the R clean tokens as a second sequence
             (`attention.side_by_side`), and their norms see the level. Clean tokens see neither, so at inference they
             pass a block once.
    none     the readout alone, as exact evidence z . e_v / sigma^2. The layers are an ordinary causal network.

Context:

    input     every block reads the tokens, and is a predictor of L/B layers.
    features  block b goes on from the clean stream that leaves block b-1, detached. Its head, layers and a readout that
              are not handed on, makes it a complete predictor. With entry `none` all layers and the last readout are an
              ordinary language model (`CausalBlocks.network`), and the other heads are only needed for training.

Shapes: N batch, T tokens, R = T - 1 rows, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.labels import categorical_target, fresh_copy
from diffusionblocks.blocks.model import Block, Denoiser, DiffusionBlocksModel, documents_apart
from diffusionblocks.errors import UserError
from diffusionblocks.networks.attention import side_by_side, token_positions
from diffusionblocks.networks.conditioning import Condition, ConditionedLayer, LevelEmbedding
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.networks.readout import IGNORED, TokenReadout, chunk_size
from diffusionblocks.theory.noise import Information, LevelDistribution
from diffusionblocks.theory.precondition import coefficients
from diffusionblocks.theory.sampler import DenoiserOutput
from diffusionblocks.theory.targets import CategoricalTarget, add_noise

HIDDEN = 1e-3


def following(batch: Batch) -> Tensor:
    """What the rows of a batch predict [N, R]: the next token, or `IGNORED` where `labels` says so, at padding, and at
    the first token of a document packed behind another."""
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
    if (segments := batch.get("segments")) is not None:
        labels = labels.masked_fill(segments[:, 1:] != segments[:, :-1], IGNORED)
    return labels


def clean_tokens(batch: Batch) -> dict[str, Tensor]:
    """The tokens that rows read [N, R]: all but the last."""
    return {name: batch[name][:, :-1] for name in ("input_ids", "segments", "positions") if name in batch}


class CausalBlock(Block):
    """A block with a reader, what noisy targets pass: its layers in input context, its head in features context."""

    def __init__(
        self,
        layers: list[nn.Module],
        *,
        features: bool,
        level: LevelEmbedding | None,
        head: list[nn.Module],
        **parts: Any,
    ) -> None:
        super().__init__(layers, **parts)
        self.level, self.head, self.features = level, nn.ModuleList(head), features

    def forward(self, use: str, *arguments: Any) -> Tensor:
        """use `read`: (hidden, c_noise of the noisy rows or None, the first of them, view) -> hidden, through the
        reader."""
        if use == "read":
            hidden, c_noise, first, view = arguments
            embedding = None if c_noise is None or self.level is None else self.level(c_noise)
            condition = None if self.level is None else Condition(embedding, first)
            return self.run(self.reader, hidden, condition, view)
        return super().forward(use, *arguments)

    @property
    def reader(self) -> nn.ModuleList:
        return self.head if self.features else self.layers


class CausalDenoiser(Denoiser):
    """forward(batch, level) -> DenoiserOutput of the R rows: logits [N, R, V], estimate [N, R, D], and a loss.

    batch: `input_ids` [N, T]; optionally `noisy_target` [N, R, D] (drawn here where it is missing), `labels`,
    `attention_mask` (0 = padding at the end) and `segments` (documents packed into one row). In features context
    `context` [N, R, D], the detached output of the block before, is needed for every block but the first. level: sigma
    [N], or [N, R] where layers do not see it.
    """

    def __init__(self, index: int, block: Block, shared: nn.ModuleDict, config: BlocksConfig, flex: bool) -> None:
        super().__init__(index, block, shared)
        self.config, self.flex = config, flex

    @property
    def target(self) -> CategoricalTarget:
        target = self.shared["target"]
        assert isinstance(target, CategoricalTarget)
        return target

    @property
    def reads_noise(self) -> bool:
        """Whether layers read the noisy target; else hidden states do not depend on it."""
        return self.config.target_entry == "replace"

    def head(self) -> TokenReadout:
        return self.part("readout")

    def forward(self, batch: Batch, level: Tensor) -> DenoiserOutput:
        """Raises UserError when the batch lacks what this block reads."""
        if "input_ids" not in batch:
            raise UserError("a denoiser of tokens reads batch['input_ids']; got " + ", ".join(batch))
        noisy, labels = batch.get("noisy_target"), following(batch)
        if noisy is None:
            noisy = add_noise(self.target.clean(batch["input_ids"][:, 1:]), level)
        hidden, context = self.rows(batch, noisy, level)
        raw = self.head()(hidden)
        logits = self.target.logits(raw, noisy, level)
        losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        return DenoiserOutput(self.target.estimate(logits), raw, logits, context, losses)

    def losses(
        self, batch: Batch, noisy: Tensor, level: Tensor, weights: Tensor | None = None, *, settling: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropies of the rows [N, R] in nats, 0 where there is nothing to predict, or, with weights [N, R], the
        sum of them times these; and the clean stream for the next block. settling: only the head gets gradients."""
        hidden, context = self.rows(batch, noisy, level, settling=settling)
        evidence = self.target.evidence(noisy, level)
        return self.head()(hidden, following(batch), evidence=evidence, weights=weights), context

    def rows(
        self, batch: Batch, noisy: Tensor | None, level: Tensor | None, *, settling: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states [N, R, D]; and the clean stream that leaves the trunk (features context).

        noisy [N, R, D], level [N]: only needed where `reads_noise`. settling: only the head gets gradients.
        """
        read, features = clean_tokens(batch), self.config.context == "features"
        with torch.no_grad() if settling else nullcontext():
            hidden = self.trunk(batch) if features else self.part("stem")(read)
        context = hidden if features else None
        if not self.reads_noise:
            return self.block("read", hidden, None, 0, documents_apart(read, hidden)), context
        assert noisy is not None and level is not None
        entering = self.enter(noisy, level, token_positions(batch)[:, 1:]).to(hidden)
        view = side_by_side(batch, hidden, flex=self.flex)
        first = hidden.shape[1]
        both = self.block("read", torch.cat([hidden, entering], 1), coefficients(level.float()).noise, first, view)
        return both[:, first:], context

    def enter(self, noisy: Tensor, level: Tensor, positions: Tensor) -> Tensor:
        """z [N, R, D] at level [N] -> what the layers read of it: c_in z, at the positions of the tokens that it
        hides."""
        scaled = coefficients(level.float()).input[:, None, None] * noisy
        scaled = scaled.to(next(self.block.parameters()).dtype)
        return scaled if self.config.context == "features" else self.part("stem").place(scaled, positions)

    def trunk(self, batch: Batch) -> Tensor:
        """Features context: the clean stream that leaves this block [N, R, D]."""
        read = clean_tokens(batch)
        hidden = self.entering(batch) if self.index else self.part("stem")(read)
        return self.block("trunk", hidden, documents_apart(read, hidden))

    def measure(self, hidden: Tensor, noisy: Tensor, level: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance of the estimate from the clean target, and cross-entropy in nats [M] each, in chunks.

        hidden, noisy [M, D], level, labels [M].
        """
        errors, losses = [], []
        size = chunk_size(len(hidden), self.head().head.out_features)
        for part in zip(*(tensor.split(size) for tensor in (hidden, noisy, level, labels)), strict=True):
            logits = self.target.logits(self.head()(part[0]), part[1], part[2]).float()
            losses.append(cross_entropy(logits, part[3], reduction="none"))
            errors.append((self.target.estimate(logits) - self.target.clean(part[3])).square().sum(-1))
        return torch.cat(errors), torch.cat(losses)


class CausalBlocks(DiffusionBlocksModel):
    """Blocks that denoise the embedding of the next token."""

    def __init__(self, parts: Parts, config: BlocksConfig, source: Any = None) -> None:
        self._flex = getattr(parts.network.config, "_attn_implementation", "") == "flex_attention"
        super().__init__(parts, config, source)
        self._ordinary = (parts.network,)  # in a tuple: its parameters are registered once, through the blocks

    def _levels(self, parts: Parts) -> LevelDistribution:
        self.shared["target"] = target = categorical_target(parts, self.config)
        return self.config.distribution(target.rows.detach(), zipf(parts.num_classes))

    def revealing_level(self) -> float:
        """The level below which noise hides a token no more: a thousandth of what it hides at most, by the rows
        alone."""
        rows = self.denoiser(0).target.rows
        return Information(rows, zipf(len(rows))).level(torch.tensor(HIDDEN)).item()

    @property
    def reads_idle_blocks(self) -> bool:
        settles = self.config.distill and any(len(block.head) for block in self.blocks)  # type: ignore[arg-type]
        return bool(self.config.ordinary) or settles

    def learning(self, index: int) -> None:
        """From now on gradients are for block `index` alone, whatever its step passes."""
        if self.reads_idle_blocks:
            for block in map(self.block, range(self.num_blocks)):
                block.requires_grad_(block is self.block(index))

    def answer(self, index: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Features context: what the layers after block `index` make of its output, hidden [N, R, D], before the
        readout.

        Their activations are recomputed in the backward pass, which leaves them as they are (see `learning`).
        """
        read = clean_tokens(batch)
        views = [view] if (view := documents_apart(read, hidden)) is not None else []
        for after in range(index + 1, self.num_blocks):
            for layer in self.block(after).layers:
                hidden = checkpoint(layer, hidden, *views, use_reentrant=False)
        return hidden

    def _denoiser(self, index: int) -> CausalDenoiser:
        return CausalDenoiser(index, self.block(index), self.shared, self.config, self._flex)

    def _build(self, parts: Parts) -> Iterator[Block]:
        return self._input_blocks(parts) if self.config.context == "input" else self._feature_blocks(parts)

    def _conditioned(self, layers: list[nn.Module], parts: Parts) -> tuple[list[nn.Module], LevelEmbedding | None]:
        width = self.config.condition_width
        if not width or not layers:
            return layers, None
        return [ConditionedLayer(layer, parts.layer_norms, parts.width, width) for layer in layers], LevelEmbedding(
            width
        )

    def _input_blocks(self, parts: Parts) -> Iterator[Block]:
        copies = self.config.shared == "copies"
        if not copies:
            self.shared.update({"stem": parts.stem, "readout": parts.readout})
        for span in self.layers:
            # Copied together: where they share a parameter, so do the copies.
            stem, readout = copy.deepcopy((parts.stem, parts.readout)) if copies else (None, None)
            layers, level = self._conditioned([parts.layers[i] for i in span], parts)
            yield CausalBlock(layers, features=False, level=level, head=[], stem=stem, readout=readout)

    def _feature_blocks(self, parts: Parts) -> Iterator[Block]:
        last = self.config.num_blocks - 1
        common, frozen = self.config.shared != "copies", self.config.shared == "frozen"
        if common:
            self.shared["readout"] = parts.readout
        if frozen:
            self.shared["stem"] = parts.stem
        elif parts.tied and (
            last or common
        ):  # block 0 owns the stem: a parameter of stem and readout would have two owners
            untie(parts)
        for index, span in enumerate(self.layers):
            heads = self.config.heads(index == last, "causal")
            head = [_renumbered(layer, len(parts.layers) + i) for i, layer in enumerate(self._head(parts, span, heads))]
            layers, level = self._conditioned(head, parts)
            yield CausalBlock(
                [parts.layers[i] for i in span],
                features=True,
                level=level,
                head=layers,
                stem=parts.stem if index == 0 and not frozen else None,
                readout=None if common else parts.readout if index == last else copy.deepcopy(parts.readout),
            )

    def _head(self, parts: Parts, span: range, count: int) -> list[nn.Module]:
        """Layers between the trunk of a block and its readout."""
        if self.config.head_start == "last":
            return [copy.deepcopy(layer) for layer in parts.layers[len(parts.layers) - count :]] if count else []
        return [fresh_copy(parts.layers[span[-1]]) for _ in range(count)]

    @property
    def is_ordinary(self) -> bool:
        """Whether all layers and the last readout are an ordinary language model."""
        return self.config.context == "features" and self.config.target_entry == "none"

    @property
    def network(self) -> Any:
        """The ordinary language model of transformers that the blocks are without their heads. Its parameters are
        theirs.

        Raises UserError where there is none.
        """
        if not self.is_ordinary:
            raise UserError(
                "these blocks are no ordinary language model: only blocks.context features with blocks.target_entry "
                "none are"
            )
        return self._ordinary[0]

    def save_network(self, folder: Any) -> None:
        """Saves `network` as an ordinary Hugging Face model."""
        self.network.save_pretrained(folder)


def zipf(count: int) -> Tensor:
    """Weights [V] that stand in for how often tokens are met. Which of them is the most frequent does not matter to
    random rows."""
    return 1 / torch.arange(1.0, count + 1)


def untie(parts: Parts) -> None:
    """Gives the readout of a network a parameter of its own where it shared that of the stem."""
    parts.readout.head = copy.deepcopy(parts.readout.head)
    parts.network.set_output_embeddings(parts.readout.head)
    parts.network.config.tie_word_embeddings = parts.tied = False


def _renumbered(layer: nn.Module, index: int) -> nn.Module:
    """With a number of its own in a cache of keys and values."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return layer
