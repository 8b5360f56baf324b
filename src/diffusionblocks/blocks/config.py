"""How a network becomes blocks: the options of `convert`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from diffusionblocks.errors import UserError
from diffusionblocks.options import check_options, key_of, option
from diffusionblocks.theory import costs
from diffusionblocks.theory.noise import Information, LevelDistribution, LogNormal, MaskingSchedule


@dataclass(kw_only=True)
class BlocksConfig:
    """The defaults are the project's; the recipes' preset `paper` gives the paper's.

    Args:
        num_blocks: Number of blocks, B: the one dial.
        layers_per_block: Layers of each block, where they are not to be equal parts. Empty = equal parts.
        context: What a block reads. `input`: every block reads x. `features`: block b reads what block b-1 made of x,
            detached.
        target_entry: Where the noisy target enters the network. `replace` the first token ([DB]; of tokens: a noisy
            sequence beside the clean one), `add` to it through a projection that starts at zero (labels only), or
            `none` (only the readout sees it).
        readout: What makes the logits. `bayes` adds the exact evidence z . e_v / sigma^2 to them; `linear` does not
            ([DB]).
        target_table: Embeddings of the targets. `fixed` orthonormal rows or `trained` ones ([DB]).
        shared: Whose stem, readout and table are, in `input` context. `trained` by every block's step ([DB]),
            `frozen`, or `copies` (each block owns its own). In `features` context block 0 owns the stem, unless it is
            `frozen`.
        target: What blocks estimate; in a recipe task.kind decides it. `label`, `image`, `masked` tokens, the next one
            (`causal`) or the next one in a looped network (`recurrent`); `auto` = what the network is made for.
        levels: Distribution of the noise levels. `information` (equal shares of nats; labels and next tokens) or
            `log-normal` ([DB]); `auto` = information where it can be, log-normal for images.
        schedule: Masking schedule of masked tokens ([MD4]).
        borders: Where the ranges of two blocks meet. `equal-mass` ([DB]), or `uniform` in log sigma, or in t (their
            ablation).
        p_mean: Mean of the log of log-normal levels.
        p_std: Standard deviation of the log of log-normal levels.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        least_hidden: Share of the target's entropy that the lowest level still hides, for information levels.
        overlap: How far a training range reaches beyond its borders, as a share of its length. Gamma in [DB].
        condition_width: Width of the level embedding, C; 0 = blocks that do not see the level. With a Bayes readout and
            no target entry the ideal p(v | x) does not depend on it, nor does that of masked tokens.
        head_layers: Extra layers between a block's trunk and its readout, in features context; not handed on. The last
            block of next-token denoisers has none, unless its head is where the noisy target enters: its trunk hands
            nothing on.
        head_start: First weights of these layers. `fresh`, or those of the network's `last` layers (next tokens).
        distill: While only heads learn (local.heads_first), they learn what the whole network answers. Otherwise the
            tokens of the text. Next tokens in features context.
        ordinary: Weight of the ordinary loss at the end of the network beside the block's own; 0 = none. Next tokens in
            features context: it passes the layers after the block (without it blocks need nothing of one another). The
            block's own loss then counts exp(ordinary loss - own loss): as much as its head can be trusted.
        prelude: Layers before the core of a looped network.
        coda: Layers after the core of a looped network. The core is all others; they are one block.
    """

    num_blocks: int = option(3, least=1)
    layers_per_block: list[int] = option([], least=1)
    context: str = option("input", choices=("input", "features"))
    target_entry: str = option("none", choices=("replace", "add", "none"))
    readout: str = option("bayes", choices=("bayes", "linear"))
    target_table: str = option("fixed", choices=("fixed", "trained"))
    shared: str = option("copies", choices=("trained", "frozen", "copies"))
    target: str = option("auto", key=None, choices=("auto", "label", "image", "masked", "causal", "recurrent"))
    levels: str = option("auto", choices=("auto", "information", "log-normal"), group="noise")
    schedule: str = option("linear", choices=("linear", "cosine"), group="noise")
    borders: str = option("equal-mass", choices=("equal-mass", "uniform"), group="noise")
    p_mean: float = option(-1.2, group="noise")
    p_std: float = option(1.2, above=0, group="noise")
    sigma_min: float = option(0.002, above=0, group="noise")
    sigma_max: float = option(80.0, above=0, group="noise")
    least_hidden: float = option(0.65, least=0, below=1, group="noise")
    overlap: float = option(0.05, least=0, most=1, group="noise")
    condition_width: int = option(0, least=0)
    head_layers: int = option(0, least=0, group="local")
    head_start: str = option("fresh", choices=("fresh", "last"), group="local")
    distill: bool = option(False, group="local")
    ordinary: float = option(0.0, least=0, group="local")
    prelude: int = option(0, least=0, group="looped")
    coda: int = option(0, least=0, group="looped")

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
            for field in (field for field in fields(self) if field.name in self.LABEL_ONLY):
                alike = target == "masked" and field.name == "condition_width"
                if getattr(self, field.name) != field.default and not alike:
                    key = key_of(field, "blocks")
                    raise UserError(f"{key} is for networks that denoise labels; this one denoises {what}")
        if target == "causal":
            self._check_causal()
        if target == "recurrent":
            self._check_recurrent()
        elif self.prelude or self.coda:
            raise UserError("looped.prelude and looped.coda are for looped networks (task.kind recurrent-lm)")
        if target == "image" and self.levels == "information":
            raise UserError("noise.levels information needs a discrete target; images take log-normal")
        if target == "masked" and self.levels != "auto":
            raise UserError("noise.levels is for Gaussian noise; masked tokens take noise.schedule")
        if target != "masked" and self.schedule != BlocksConfig.schedule:
            raise UserError("noise.schedule is for masked tokens; Gaussian noise takes noise.levels")
        if self.head_layers and self.context != "features":
            raise UserError(
                "local.head_layers needs blocks.context features: an input-context block has no separate head"
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
                "local.ordinary and local.distill need blocks.context features and blocks.target_entry none"
            )
        if (self.ordinary or self.distill) and self.shared != "frozen":  # else a block's readout is not the network's
            raise UserError("local.ordinary and local.distill need blocks.shared frozen")
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
                "blocks.target_entry replace in features context needs local.head_layers: they read the noisy target"
            )

    def _check_recurrent(self) -> None:
        if self.num_blocks != 1:
            raise UserError(
                "a looped network is not split: its layers are shared by all noise levels; set blocks.num_blocks to 1, "
                f"got {self.num_blocks}"
            )
        if self.layers_per_block:
            raise UserError(
                "blocks.layers_per_block is for networks that are split; a looped one has looped.prelude and "
                "looped.coda"
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
