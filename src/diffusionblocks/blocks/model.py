"""A residual network split into blocks that can be trained alone.

`BlockModel` is what the trainer sees: blocks that own parameters, and shared parts. Two kinds exist:
`DiffusionBlocksModel`, whose blocks are denoisers for one noise range each, and `EndToEndModel`, the ordinary
network as one block. Both are built from the `Parts` that an adapter finds in a Hugging Face model. What a denoiser
estimates (a label, an image) is the subject of the modules beside this one (labels, images, masked, causal, looped).

Shapes: N batch, T positions, D width, V classes, B blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.handed import Passage, with_context
from diffusionblocks.blocks.saving import (
    aligned,
    check_ties,
    load_weights,
    named_once,
    read_tensors,
    save_described,
    save_tensors,
)
from diffusionblocks.errors import UserError, first_line
from diffusionblocks.networks.attention import View, causally
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.system.files import Damaged
from diffusionblocks.theory import costs
from diffusionblocks.theory.noise import LevelDistribution
from diffusionblocks.theory.partition import Partition, split_layers


class Block(nn.Module):
    """Some consecutive layers and what belongs to them alone. Optional parts are None."""

    def __init__(
        self, layers: list[nn.Module], *, stem: nn.Module | None = None, readout: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem, self.readout = stem, readout
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = False

    def run(self, layers: Iterable[Callable[..., Tensor]], hidden: Tensor, *conditions: Any) -> Tensor:
        """Applies `layers` to hidden [N, T, D], recomputing activations in the backward pass if asked.

        conditions: what layers see beside it; those that are None are not passed on.
        """
        arguments = [condition for condition in conditions if condition is not None]
        for layer in layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, *arguments, use_reentrant=False)
            else:
                hidden = layer(hidden, *arguments)
        return hidden

    def forward(self, use: str, *arguments: Any) -> Tensor:
        """use `trunk`: (hidden, *conditions) -> hidden."""
        assert use == "trunk", use
        return self.run(self.layers, *arguments)


def documents_apart(batch: Batch, hidden: Tensor) -> View | None:
    """What causal layers must be told about a batch: who attends to whom where several documents share a row; else
    None."""
    return causally(batch, hidden) if "segments" in batch else None


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

    @property
    def is_ordinary(self) -> bool:
        """Whether it is an ordinary network of transformers as it is (its `network`)."""
        return False

    @property
    def reads_idle_blocks(self) -> bool:
        """Whether a block's step passes layers of other blocks."""
        return False

    def layer_evaluations(self, index: int) -> float:
        """Layers that one sample passes when block `index` trains on it."""
        return len(self.block(index).layers)


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
        (network,) = self._network
        if len(layers) < len(parts.layers):
            del network.get_submodule(self._layers_path)[len(layers) :]
            self._record_depth(network, len(layers))
        if trained_layers is not None:
            parts.stem.requires_grad_(False)
            for layer in layers[: len(layers) - trained_layers]:
                layer.requires_grad_(False)
        self.blocks = nn.ModuleList([Block(layers, stem=parts.stem, readout=parts.readout)])
        self.shared = nn.ModuleDict()
        self.layers = [range(len(layers))]

    def _remember(self, parts: Parts) -> None:
        self._layers_path, self._depth_key = parts.layers_path, parts.depth_key
        self._network = (parts.network,)  # in a tuple: its parameters are registered once, through the blocks

    def forward(self, batch: Batch, active: int | None = None, passage: Passage | None = None) -> Tensor:
        """batch of the stem's inputs -> logits. active: the block that trains (here there is but one). passage: of a
        batch that goes from block to block (`BlockCoordinateModel`)."""
        return self.readout(self.hidden(batch, active, passage))

    @property
    def is_ordinary(self) -> bool:
        return True

    @property
    def network(self) -> Any:
        """The ordinary network of transformers or diffusers, of which the blocks and shared parts are submodules."""
        return self._network[0]

    def hidden(self, batch: Batch, active: int | None = None, passage: Passage | None = None) -> Tensor:
        """What the last layer hands to the readout [N, T, D]."""
        hidden = self.stem(batch)
        return self.block(0)("trunk", hidden, documents_apart(batch, hidden))

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
        trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in layers)
        return costs.partly_frozen(len(layers), trained)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the ordinary Hugging Face network with only the layers that were kept, or the adapter of `lora`."""
        network, weights = self.network, self._weights(self.network)
        network.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))

    def _weights(self, network: Any) -> dict[str, Tensor] | None:
        """What is saved, where the network's own names will not do."""
        return None

    def _record_depth(self, network: Any, depth: int) -> None:
        setattr(network.config, self._depth_key, depth)
        if kinds := getattr(network.config, "layer_types", None):
            network.config.layer_types = kinds[:depth]


class WholeDenoiser(EndToEndModel):
    """A whole network as one denoiser of all noise levels: what `end-to-end` is for a diffusion model.

    Args:
        levels: distribution of noise levels in training. The rest as in `EndToEndModel`.
    """

    def __init__(
        self,
        parts: Parts,
        num_layers: int | None = None,
        *,
        trained_layers: int | None = None,
        levels: LevelDistribution,
    ) -> None:
        super().__init__(parts, num_layers, trained_layers=trained_layers)
        self.partition = Partition(levels, 1, 0.0)

    @property
    def is_ordinary(self) -> bool:
        return False

    def denoiser(self, index: int) -> Any:
        raise NotImplementedError


class Denoiser(nn.Module):
    """One block as an ordinary module: trainable alone, by any loop.

    Its parameters are the block's and the shared ones. forward(batch, level) -> DenoiserOutput; what it reads from
    `batch` depends on the target, and is said by the subclass.
    """

    def __init__(self, index: int, block: Block, shared: nn.ModuleDict) -> None:
        super().__init__()
        self.index = index
        self.block, self.shared = block, shared

    def part(self, name: str) -> Any:
        """`stem` or `readout`: the block's own, or the one that all share."""
        own = getattr(self.block, name)
        return self.shared[name] if own is None else own

    def entering(self, batch: Batch) -> Tensor:
        """Features context: the clean stream that a block after the first goes on from. Raises UserError when it is
        missing."""
        if "context" not in batch:
            before = self.index - 1
            raise UserError(f"block {self.index} reads the features of block {before}: pass them as batch['context']")
        return batch["context"]


class DiffusionBlocksModel(BlockModel):
    """B denoisers, one noise range each. `diffusionblocks.convert` builds the subclass for a network's target.

    A subclass says how blocks are put together (`_build`), what a denoiser is (`_denoiser`) and which distribution
    noise levels have (`_levels`).

    Args:
        parts: from an adapter. config: how to split and condition.
        source: what is needed to build `parts` again (saved beside the weights).
    """

    def __init__(self, parts: Parts, config: BlocksConfig, source: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        config.check(parts.target)
        self.config, self.source, self.target = config, dict(source or {}), parts.target
        self.layers = split_layers(len(parts.layers), config.num_blocks, config.layers_per_block)
        self.shared = nn.ModuleDict()
        self.partition = Partition(self._levels(parts), config.num_blocks, config.overlap, config.borders)
        self.blocks = nn.ModuleList(self._build(parts))
        if config.shared == "frozen":
            self.shared.requires_grad_(False)
        # In a tuple, so that their parameters are registered once, through the blocks.
        self._denoisers = tuple(self._denoiser(index) for index in range(config.num_blocks))
        self.holders = tuple(range(config.num_blocks))

    def _levels(self, parts: Parts) -> LevelDistribution:
        raise NotImplementedError

    def _build(self, parts: Parts) -> Iterable[Block]:
        raise NotImplementedError

    def _denoiser(self, index: int) -> Denoiser:
        raise NotImplementedError

    def denoiser(self, index: int) -> Any:
        """Block `index` as an ordinary module (no copies: its parameters are the model's).

        While blocks are still one network (before branching), the one that holds it: `holders`, one per block.
        """
        self.block(index)  # checks the index
        return self._denoisers[self.holders[index]]

    @torch.no_grad()
    def context(self, batch: Batch, index: int) -> Tensor | None:
        """Features context: the clean stream that enters block `index` [N, T, D], computed by the blocks before it.

        None in input context and for block 0.
        """
        if self.config.context == "input" or index == 0:
            return None
        hidden: Tensor | None = None
        for before in range(index):
            hidden = self.denoiser(before).trunk(with_context(batch, hidden))
        return hidden

    def layer_evaluations(self, index: int) -> float:
        after = self.layers[-1].stop - self.layers[index].stop
        return self.config.evaluations(len(self.layers[index]), index == self.num_blocks - 1, self.target, after)

    def owner_of_shared_parts(self) -> str:
        if self.config.context == "features" and self.config.shared == "copies":
            return "block 0 owns the stem, each block its readout"
        if self.config.context == "features" and self.config.shared == "frozen" and self.target == "causal":
            return "frozen"
        return {
            "trained": "trained by every block's step",
            "frozen": "frozen",
            "copies": "each block owns its stem and readout",
        }[self.config.shared]

    def summary(self) -> str:
        """A table: block, layers, noise range, parameters, and who owns the shared parts."""
        rows = [("block", "layers", f"noise range ({self.partition.levels.unit})", "parameters")]
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
        return f"{aligned(rows)}\ncontext: {self.config.context}; shared parts: {self.owner_of_shared_parts()}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights as safetensors and everything else as JSON; `diffusionblocks.load` reads them back."""
        save_described(self, folder, {"blocks": asdict(self.config), "source": self.source})

    def start_from(self, folder: str | Path) -> None:
        """Takes over the weights that `save_pretrained` wrote. Raises UserError when they are of another kind of
        model."""
        load_weights(self, folder)

    def save_block(self, index: int, path: str | Path) -> None:
        """Writes the weights of one block, as safetensors that say what they are; `load_block` reads them back."""
        span, own = self.layers[index], self.partition.range(index)
        facts = {
            "format": "diffusionblocks block 1",
            "block": str(index),
            "layers": f"{span[0]}-{span[-1]}",
            "noise_range": f"{own.low:.6g} to {own.high:.6g}",
            "blocks": json.dumps(asdict(self.config)),
            "source": json.dumps(self._identity()),
        }
        save_tensors(named_once(self.block(index).state_dict()), path, facts)

    def _identity(self) -> Any:
        """What the network was made from, as JSON reads it back, without what libraries note for themselves."""
        config = {key: value for key, value in self.source.get("config", {}).items() if not key.startswith("_")}
        return json.loads(json.dumps({**self.source, "config": config}))

    def load_block(self, path: str | Path) -> int:
        """Puts an exported block in its place and returns its index; the others stay as they are.

        Raises UserError when the file is no exported block, or of another network or conversion.
        """
        try:
            tensors, facts = read_tensors(path)
        except OSError as error:
            raise UserError(f"cannot read the block {path}: {error.strerror or first_line(error)}") from None
        if not facts.get("format", "").startswith("diffusionblocks block"):
            raise UserError(f"{path} is no exported block; dblocks export writes one")
        try:
            index, blocks, source = (json.loads(facts[name]) for name in ("block", "blocks", "source"))
            known = _known(blocks)
        except (KeyError, ValueError, TypeError) as error:
            raise Damaged(Path(path), f"what it says of itself cannot be read: {first_line(error)}") from None
        if known != asdict(self.config) or source != self._identity():
            raise UserError(f"{path} is a block of another network, or of one that was split in another way")
        if not isinstance(index, int) or not 0 <= index < self.num_blocks:
            raise Damaged(Path(path), f"it says that it is block {index}")
        check_ties(self.block(index), tensors, path)
        own = self.block(index).state_dict()
        places = {own[name].data_ptr() for name in tensors if name in own}
        lacks = [name for name in own if name not in tensors and own[name].data_ptr() not in places]
        other = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
        if lacks or other:
            raise Damaged(Path(path), f"its tensors are not those of the block: {(lacks + other)[0]}")
        self.block(index).load_state_dict(tensors, strict=False)
        return index


def _known(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a saved conversion, with defaults for those that did not exist yet."""
    return {**asdict(BlocksConfig()), **blocks}
