"""A residual network split into blocks that can be trained alone.

`BlockModel` is what the trainer sees: blocks that own parameters, and shared parts. Two kinds exist:
`DiffusionBlocksModel`, whose blocks are denoisers for one noise range each, and `EndToEndModel`, the ordinary
network as one block. Both are built from the `Parts` that an adapter finds in a Hugging Face model.

Context (what a block reads of the clean input x):
    input     every block reads the stem's output and the noisy target enters at its first token ([DB]).
    features  block b starts from the clean stream that leaves block b-1, detached; no gradient crosses the
              border. The noisy target enters after the block's trunk: in its head layers, if any, and in the
              readout.

Shapes: N batch, T positions, D width, V classes, C condition width, B blocks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusionblocks.conditioning import ConditionedLayer, LevelEmbedding
from diffusionblocks.config import BlocksConfig
from diffusionblocks.errors import UserError
from diffusionblocks.partition import Partition, split_layers
from diffusionblocks.precondition import coefficients
from diffusionblocks.targets import CategoricalTarget, add_noise, label_table

Batch = Mapping[str, Tensor]


@dataclass(kw_only=True)
class Parts:
    """What an adapter finds in a foreign network. All modules are copies that the blocks may keep.

    Args:
        stem: forward(batch) -> hidden [N, T, D]; `first_position` [1, 1, D] is added to a token put in first place.
        layers: the residual layers, each forward(hidden) -> hidden.
        layer_norms: attribute paths, inside a layer, of the norms that see the noise level.
        readout: forward(hidden) -> logits [N, V].
        width: D. num_classes: V. tied: stem and readout share a parameter.
        network: the copied network whose submodules the parts are; training the parts trains it. layers_path: where
            its layers are.
    """

    stem: Any
    layers: list[nn.Module]
    layer_norms: tuple[str, ...]
    readout: nn.Module
    width: int
    num_classes: int
    network: Any
    layers_path: str
    tied: bool = False


class DenoiserOutput(NamedTuple):
    """What a block makes of a noisy target.

    raw: the network's own logits [N, V]; with a Bayes readout these are log p(v | x) up to a constant.
    logits: of p(v | x, z) [N, V]. estimate: D(z) [N, D]. context: clean stream for the next block [N, T, D] (features
    context) or None. loss: mean cross-entropy when the batch has labels, else None.
    """

    raw: Tensor
    logits: Tensor
    estimate: Tensor
    context: Tensor | None
    loss: Tensor | None


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


class Block(nn.Module):
    """Some consecutive layers and what belongs to them alone. Optional parts are None.

    `level` embeds the noise level for conditioned layers; a block without it runs its trunk unconditioned.
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
        super().__init__()
        self.stem, self.level, self.entry, self.readout = stem, level, entry, readout
        self.layers = nn.ModuleList(layers)
        self.head = nn.ModuleList(head or [])
        self.activation_checkpointing = False

    def run(self, layers: nn.ModuleList, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        """Applies `layers` to hidden [N, T, D], recomputing activations in the backward pass if asked."""
        for layer in layers:
            arguments = (hidden, condition) if isinstance(layer, ConditionedLayer) else (hidden,)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return hidden

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

    # One entry point for all uses, so that compiling the block (nn.Module.compile) covers them.
    def forward(self, use: str, *arguments: Any) -> Tensor:
        if use == "denoise":
            return self.denoise(*arguments)
        if use == "read":
            return self.read(*arguments)
        assert use == "trunk", use
        return self.run(self.layers, *arguments)


class BlockModel(nn.Module):
    """Blocks that each own their parameters, plus shared parts: the trainer's view of any network."""

    blocks: nn.ModuleList
    shared: nn.ModuleDict
    layers: list[range]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> Block:
        if not 0 <= index < self.num_blocks:
            raise UserError(
                f"block {index} does not exist: there are {self.num_blocks} blocks, 0 to {self.num_blocks - 1}"
            )
        module = self.blocks[index]
        assert isinstance(module, Block)
        return module

    def owners(self) -> dict[str, str]:
        """Parameter name -> owner, `block 0`, `block 1`, ... or `shared`. Every parameter has exactly one."""
        owners = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            owners[name] = f"block {rest.split('.')[0]}" if part == "blocks" else "shared"
        return owners

    def layer_evaluations(self, index: int) -> float:
        """Layers that one sample passes when block `index` trains on it (trunk and head)."""
        block = self.block(index)
        return len(block.layers) + len(block.head)


class EndToEndModel(BlockModel):
    """The ordinary network as one block: `end-to-end`, `checkpointing`, `shallow`, `lora`, `last-block` and their kin.

    Args:
        parts: from an adapter. num_layers: keep only the first layers (`shallow`); all when None.
        trained_layers: only the last so many layers and the readout are trained (`last-block`); all when None.
    """

    def __init__(self, parts: Parts, num_layers: int | None = None, *, trained_layers: int | None = None) -> None:
        super().__init__()
        layers = parts.layers[:num_layers]
        self._remember(parts)
        if trained_layers is not None:
            parts.stem.requires_grad_(False)
            for layer in layers[: len(layers) - trained_layers]:
                layer.requires_grad_(False)
        self.blocks = nn.ModuleList([Block(layers, stem=parts.stem, readout=parts.readout)])
        self.shared = nn.ModuleDict()
        self.layers = [range(len(layers))]

    def _remember(self, parts: Parts) -> None:
        self._layers_path = parts.layers_path
        self._network = (parts.network,)  # in a tuple: its parameters are registered once, through the blocks

    def forward(self, batch: Batch, active: int | None = None) -> Tensor:
        """batch of the stem's inputs -> logits. active: the block that trains (here there is but one)."""
        return self.readout(self.hidden(batch, active))

    def hidden(self, batch: Batch, active: int | None = None) -> Tensor:
        """What the last layer hands to the readout [N, T, D]."""
        return self.block(0)("trunk", self.stem(batch))

    @property
    def stem(self) -> nn.Module:
        own = self.block(0).stem
        return self.shared["stem"] if own is None else own

    @property
    def readout(self) -> nn.Module:
        own = self.block(self.num_blocks - 1).readout
        return self.shared["readout"] if own is None else own

    def layer_evaluations(self, index: int) -> float:
        """Forward through frozen layers counts a third."""
        layers = self.block(0).layers
        frozen = sum(not any(p.requires_grad for p in layer.parameters()) for layer in layers)
        return len(layers) - frozen * 2 / 3

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary Hugging Face network with only the layers that were kept, or the adapter of `lora`."""
        (network,) = self._network
        if len(network.get_submodule(self._layers_path)) > len(self.layers[0]):
            del network.get_submodule(self._layers_path)[len(self.layers[0]) :]
            network.config.num_hidden_layers = len(self.layers[0])
        network.save_pretrained(folder)


class Denoiser(nn.Module):
    """One block as an ordinary module: trainable alone, by any loop.

    Its parameters are the block's and the shared ones. forward(batch, level) reads from `batch` the stem's inputs,
    and one of `noisy_target` [N, D] and `labels` [N] (then z = table[labels] + level * eps is drawn here). In
    features context `context` [N, T, D], the detached output of the block before, is needed for every block but
    the first: `DiffusionBlocksModel.context` computes it.
    """

    def __init__(self, index: int, block: Block, shared: nn.ModuleDict, config: BlocksConfig) -> None:
        super().__init__()
        self.index, self.config = index, config
        self.block, self.shared = block, shared

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
            stem, readout = self._part("stem"), self._part("readout")
            raw = self.block("denoise", stem(batch), scaled, c.noise, readout, getattr(stem, "first_position", None))
            context = None
        else:
            context = self.trunk(batch)
            raw = self.block("read", context, scaled, c.noise, self._part("readout"))
        logits = self.target.logits(raw, noisy, level)
        loss = self.target.losses(logits, batch["labels"]).mean() if "labels" in batch else None
        return DenoiserOutput(raw, logits, self.target.estimate(logits), context, loss)

    def trunk(self, batch: Batch) -> Tensor:
        """Features context: the clean stream that leaves this block [N, T, D]."""
        hidden = batch.get("context")
        if self.index == 0:
            hidden = self._part("stem")(batch)
        elif hidden is None:
            raise UserError(
                f"block {self.index} reads the features of block {self.index - 1}: pass them as batch['context']"
            )
        return self.block("trunk", hidden)

    def _part(self, name: str) -> nn.Module:
        own = getattr(self.block, name)
        return self.shared[name] if own is None else own


class DiffusionBlocksModel(BlockModel):
    """B denoisers, one noise range each. Built by `diffusionblocks.convert`.

    Args:
        parts: from an adapter. config: how to split and condition.
        source: what is needed to build `parts` again (saved beside the weights).
    """

    def __init__(self, parts: Parts, config: BlocksConfig, source: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        config.check()
        self.config, self.source = config, dict(source or {})
        self.layers = split_layers(len(parts.layers), config.num_blocks, config.layers_per_block)
        table = label_table(parts.num_classes, parts.width)
        target = CategoricalTarget(table, trainable=config.target_table == "trained", bayes=config.readout == "bayes")
        self.partition = Partition(config.distribution(table), config.num_blocks, config.overlap)
        self.shared = nn.ModuleDict({"target": target})
        build = self._input_blocks if config.context == "input" else self._feature_blocks
        self.blocks = nn.ModuleList(build(parts))
        if config.shared == "frozen":
            self.shared.requires_grad_(False)
        # In a tuple, so that their parameters are registered once, through the blocks.
        self._denoisers = tuple(Denoiser(i, self.block(i), self.shared, config) for i in range(config.num_blocks))

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
            yield Block(
                [self._conditioned(parts.layers[i], parts) for i in span],
                stem=copy.deepcopy(parts.stem) if copies else None,
                level=self._level(),
                entry=TargetEntry(self.config.target_entry, parts.width),
                readout=copy.deepcopy(parts.readout) if copies else None,
            )

    def _feature_blocks(self, parts: Parts) -> Iterator[Block]:
        for index, span in enumerate(self.layers):
            head = [fresh_copy(parts.layers[span[-1]]) for _ in range(self.config.head_layers)]
            yield Block(
                [parts.layers[i] for i in span],
                stem=parts.stem if index == 0 else None,
                level=self._level() if head else None,
                entry=TargetEntry(self.config.target_entry, parts.width) if head else None,
                head=[self._conditioned(layer, parts) for layer in head],
                readout=copy.deepcopy(parts.readout),
            )

    def denoiser(self, index: int) -> Denoiser:
        """Block `index` as an ordinary module (no copies: its parameters are the model's)."""
        self.block(index)  # checks the index
        return self._denoisers[index]

    @torch.no_grad()
    def context(self, batch: Batch, index: int) -> Tensor | None:
        """Features context: the clean stream that enters block `index` [N, T, D], computed by the blocks before it.

        None in input context and for block 0.
        """
        if self.config.context == "input" or index == 0:
            return None
        hidden: Tensor | None = None
        for before in range(index):
            hidden = self.denoiser(before).trunk(batch if hidden is None else {**batch, "context": hidden})
        return hidden

    def summary(self) -> str:
        """A table: block, layers, noise range, parameters, and who owns the shared parts."""
        rows = [("block", "layers", "noise range (sigma)", "parameters")]
        for index, span in enumerate(self.layers):
            own = self.partition.range(index)
            rows.append(
                (
                    str(index),
                    f"{span[0]}-{span[-1]}",
                    f"{own.high:.4g} to {own.low:.4g}",
                    f"{sum(p.numel() for p in self.block(index).parameters()):,}",
                )
            )
        shared = sum(p.numel() for p in self.shared.parameters())
        rows.append(("shared", ", ".join(self.shared), "", f"{shared:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        owner = {
            "trained": "trained by every block's step",
            "frozen": "frozen",
            "copies": "each block owns its stem and readout",
        }[self.config.shared]
        if self.config.context == "features":
            owner = "block 0 owns the stem, each block its readout"
        return "\n".join([*lines, f"context: {self.config.context}; shared parts: {owner}"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights as safetensors and everything else as JSON; `diffusionblocks.load` reads them back."""
        from safetensors.torch import save_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        description = {"format": 1, "blocks": asdict(self.config), "source": self.source}
        (folder / "diffusionblocks.json").write_text(json.dumps(description, indent=2) + "\n")


def fresh_copy(layer: nn.Module) -> nn.Module:
    """A copy of `layer` with weights drawn anew: normal(0, 0.02) matrices, zero biases, norms left as they are."""
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return layer
