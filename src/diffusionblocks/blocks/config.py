"""How a network becomes blocks: the options of `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.options import check_options, option
from diffusionblocks.theory import costs
from diffusionblocks.theory.noise import Information, LevelDistribution, LogNormal, MaskingSchedule


@dataclass(kw_only=True)
class BlocksConfig:
    """The defaults are the project's; the recipes' preset `paper` gives the paper's.

    Args:
        num_blocks: B, the one dial.
        layers_per_block: explicit uneven split; empty = equal parts.
        context: `input` (every block reads x) or `features` (block b reads what block b-1 made of x, detached).
        target_entry: where the noisy target enters the network: `replace` the first token ([DB]; of tokens: a noisy
            sequence beside the clean one), `add` to it through a projection that starts at zero (labels only), or
            `none` (only the readout sees it).
        readout: `bayes` adds the exact evidence z . e_v / sigma^2 to the logits; `linear` does not ([DB]).
        target_table: `fixed` orthonormal rows or `trained` ones ([DB]).
        shared: stem, readout and table in `input` context: `trained` by every block's step ([DB]), `frozen`, or
            `copies` (each block owns its own). In `features` context block 0 owns the stem, unless it is `frozen`.
        target: what blocks estimate: `label`, `image`, `masked` tokens, the next one (`causal`) or the next one in a
            looped network (`recurrent`); `auto` = what the network is made for.
        levels: `information` (equal shares of nats; labels and next tokens) or `log-normal` ([DB]);
            `auto` = information where it can be, log-normal for images. schedule: of masked tokens, `linear` or
            `cosine`.
        borders: ranges of `equal-mass` ([DB]), or `uniform` in log sigma, or in t (their ablation).
        least_hidden: information levels only: share of the target's entropy that the lowest level still hides.
        sigma_min, sigma_max: range of levels; p_mean, p_std: of log-normal levels.
        overlap: gamma, how far a training range reaches beyond its borders, as a share of its length.
        condition_width: C, width of the level embedding; 0 = blocks that do not see the level (with a Bayes readout
            and no target entry the ideal p(v | x) does not depend on it, nor does that of masked tokens).
        head_layers: extra layers between a block's trunk and its readout (features context); not handed on. The last
            block of next-token denoisers has none, unless its head is where the noisy target enters: its trunk hands
            nothing on.
        head_start: weights of these layers: `fresh`, or those of the network's `last` layers (next tokens).
        distill: next tokens in features context: as long as only heads learn (train.heads_first) they learn what the
            whole network answers, not the tokens of the text.
        ordinary: next tokens in features context: weight of the ordinary loss at the end of the network, through the
            layers after the block, beside the block's own (0 = none: blocks need nothing of one another), which counts
            exp(ordinary loss - own loss): as much as its head can be trusted.
        prelude, coda: looped networks only: layers before and after the core, which is all others. They are one block.
    """

    num_blocks: int = option(3, least=1)
    layers_per_block: list[int] = option([], least=1)
    context: str = option("input", choices=("input", "features"))
    target_entry: str = option("none", choices=("replace", "add", "none"))
    readout: str = option("bayes", choices=("bayes", "linear"))
    target_table: str = option("fixed", choices=("fixed", "trained"))
    shared: str = option("copies", choices=("trained", "frozen", "copies"))
    target: str = option("auto", choices=("auto", "label", "image", "masked", "causal", "recurrent"))
    levels: str = option("auto", choices=("auto", "information", "log-normal"))
    schedule: str = option("linear", choices=("linear", "cosine"))
    borders: str = option("equal-mass", choices=("equal-mass", "uniform"))
    p_mean: float = -1.2
    p_std: float = option(1.2, above=0)
    sigma_min: float = option(0.002, above=0)
    sigma_max: float = option(80.0, above=0)
    least_hidden: float = option(0.65, least=0, below=1)
    overlap: float = option(0.05, least=0, most=1)
    condition_width: int = option(0, least=0)
    head_layers: int = option(0, least=0)
    head_start: str = option("fresh", choices=("fresh", "last"))
    distill: bool = False
    ordinary: float = option(0.0, least=0)
    prelude: int = option(0, least=0)
    coda: int = option(0, least=0)

    # What only makes sense where a label is the target and the network reads something else (masked tokens: with the
    # level).
    LABEL_ONLY: ClassVar[tuple[str, ...]] = (
        "target_entry",
        "readout",
        "target_table",
        "least_hidden",
        "condition_width",
        "head_layers",
        "head_start",
        "distill",
        "ordinary",
        "context",
    )

    def check(self, target: str = "label") -> None:
        """Raises UserError for an unknown choice or a combination that has no meaning for what is denoised."""
        check_options("blocks", self)
        if target in ("image", "masked"):
            what = "images" if target == "image" else "masked tokens"
            for name in self.LABEL_ONLY:
                alike = target == "masked" and name == "condition_width"
                if getattr(self, name) != getattr(BlocksConfig, name) and not alike:
                    raise UserError(f"blocks.{name} is for networks that denoise labels; this one denoises {what}")
        if target == "causal":
            self._check_causal()
        if target == "recurrent":
            self._check_recurrent()
        elif self.prelude or self.coda:
            raise UserError("blocks.prelude and blocks.coda are for looped networks (task.kind recurrent-lm)")
        if target == "image" and self.levels == "information":
            raise UserError("blocks.levels information needs a discrete target; images take log-normal")
        if target == "masked" and self.levels != "auto":
            raise UserError("blocks.levels is for Gaussian noise; masked tokens take blocks.schedule")
        if target != "masked" and self.schedule != BlocksConfig.schedule:
            raise UserError("blocks.schedule is for masked tokens; Gaussian noise takes blocks.levels")
        if self.head_layers and self.context != "features":
            raise UserError(
                "blocks.head_layers needs blocks.context features: an input-context block has no separate head"
            )
        if self.readout == "linear" and not self.condition_width:
            raise UserError(
                "blocks.readout linear needs the noise level: set blocks.condition_width (64 is a good value)"
            )
        if self.target_table == "trained" and self.shared == "copies":
            raise UserError(
                "blocks.target_table trained needs blocks.shared trained or frozen: blocks must agree on the table"
            )

    def _check_causal(self) -> None:
        if (self.ordinary or self.distill) and (self.context != "features" or self.target_entry != "none"):
            raise UserError(
                "blocks.ordinary and blocks.distill need blocks.context features and blocks.target_entry none"
            )
        if (self.ordinary or self.distill) and self.shared != "frozen":  # else a block's readout is not the network's
            raise UserError("blocks.ordinary and blocks.distill need blocks.shared frozen")
        if self.target_entry == "add":
            raise UserError("blocks.target_entry add is for labels; next-token denoisers take replace or none")
        if self.target_entry == "none" and self.readout == "linear":
            raise UserError(
                "blocks.readout linear needs a noisy target that the network reads: set blocks.target_entry replace"
            )
        if self.target_entry == "none" and self.condition_width:
            raise UserError(
                "blocks.condition_width is for next-token denoisers that read the noisy target (blocks.target_entry "
                "replace)"
            )
        if self.target_entry == "replace" and self.context == "features" and not self.head_layers:
            raise UserError(
                "blocks.target_entry replace in features context needs blocks.head_layers: they read the noisy target"
            )

    def _check_recurrent(self) -> None:
        if self.num_blocks != 1:
            raise UserError(
                "a looped network is not split: its layers are shared by all noise levels; set blocks.num_blocks to 1, "
                f"got {self.num_blocks}"
            )
        if self.layers_per_block:
            raise UserError(
                "blocks.layers_per_block is for networks that are split; a looped one has blocks.prelude and "
                "blocks.coda"
            )
        if self.target_entry != "none" or self.context != "input":
            raise UserError(
                "the state of a looped network is the noisy target: blocks.target_entry and blocks.context do not apply"
            )

    def heads(self, last: bool, target: str) -> int:
        """Head layers of a block; `last`: of the one that hands nothing on."""
        return 0 if target == "causal" and last and self.target_entry == "none" else self.head_layers

    def evaluations(self, layers: int, last: bool, target: str, after: int = 0) -> int:
        """Layers that a sample passes in a step of a block of `layers`. A noisy sequence beside the clean one counts as
        much.

        after: layers behind the block, which the ordinary loss passes (forward, recomputed, and backward without
        weights).
        """
        twice = 2 if target == "causal" and self.target_entry == "replace" else 1
        heads, behind = self.heads(last, target), after if self.ordinary else 0
        return costs.denoiser(layers, heads, twice, behind, features=self.context == "features")

    def may_branch(self, layers: list[range]) -> bool:
        """Whether blocks can start as copies of one: equal depth, the same input, nothing trained in common."""
        alike = len({len(span) for span in layers}) == 1
        return alike and len(layers) > 1 and self.context == "input" and self.shared == "copies"

    def distribution(self, table: Tensor | None = None, prior: Tensor | None = None) -> LevelDistribution:
        """Of Gaussian noise levels; `table` [V, D] holds the embeddings of a discrete target, `prior` [V] how often
        each is met (None = all alike)."""
        if self.levels == "information" or (self.levels == "auto" and table is not None):
            assert table is not None
            return Information(
                table, prior, sigma_min=self.sigma_min, sigma_max=self.sigma_max, least_hidden=self.least_hidden
            )
        return LogNormal(self.p_mean, self.p_std, self.sigma_min, self.sigma_max)

    def masking(self) -> MaskingSchedule:
        return MaskingSchedule(self.schedule)
