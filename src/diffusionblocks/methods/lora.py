"""Low-rank adaptation through peft (Hu et al. 2022, arXiv 2106.09685): the network stays frozen, small matrices
train."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError
from diffusionblocks.methods.base import Method, Result
from diffusionblocks.networks.registry import find_adapter
from diffusionblocks.recipes import Recipe
from diffusionblocks.system.run_folder import MODEL


def lora_model(network: Any, rank: int, alpha: int, *, train_readout: bool, blocks: BlocksConfig) -> EndToEndModel:
    """A copy of `network` with LoRA on every linear map of its layers.

    Args:
        rank, alpha: of the update, alpha / rank * B A. train_readout: train the readout in full (a new classifier).
        blocks: supplies the target, and the distribution of noise levels of a diffusion network.

    Raises UserError when peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("the method lora needs peft: pip install 'diffusionblocks[lora]'") from None
    adapter = find_adapter(type(network).__name__)
    network = copy.deepcopy(network)
    layers = network.get_submodule(adapter.layers)
    maps = [f"{adapter.layers}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    whole = list(adapter.readout) if train_readout else None
    wrapped = get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, target_modules=maps, modules_to_save=whole))
    parts = adapter.take_apart(network, blocks.target, copied=True)
    parts.network, parts.layers_path = wrapped, f"base_model.model.{adapter.layers}"
    model = whole_network(parts, blocks)
    assert isinstance(model, EndToEndModel)
    return model


class Lora(Method):
    name = "lora"
    description = "low-rank adaptation of a pretrained network (peft)"
    adapts = True
    reads = ("lora",)

    def build(self, recipe: Recipe, network: Any) -> BlockModel:
        blocks = dataclasses.replace(recipe.blocks, target=recipe.task.target)
        # A classifier's readout is new; a pretrained one of tokens stays as it is, as usual.
        new = not isinstance(recipe.data, TextConfig)
        return lora_model(network, recipe.lora.rank, recipe.lora.alpha, train_readout=new, blocks=blocks)

    def rows(self, recipe: Recipe) -> tuple[bool, ...]:
        return (False, True) if recipe.model.pretrained else ()

    def rank(self, recipe: Recipe, tied: bool) -> int:
        return 20

    def reason(self, recipe: Recipe, tied: bool) -> str:
        return "full fine-tuning does not fit; LoRA does, and is the best-tested way to adapt a network on such a card"

    def result(self, recipe: Recipe, model: BlockModel) -> Result:
        return Result(MODEL, "peft adapter", False)


METHODS = (Lora(),)
