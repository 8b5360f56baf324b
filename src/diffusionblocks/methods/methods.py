"""Methods that `compare` sets side by side. A method is a configuration of the one trainer, never a second loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.convert import convert
from diffusionblocks.blocks.exact import BlockCoordinateModel, layer_evaluations
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.methods.lora import lora_model
from diffusionblocks.networks.parts import Parts
from diffusionblocks.networks.registry import pretrained_config, take_apart
from diffusionblocks.recipes import Recipe, build
from diffusionblocks.recipes.load import BRANCHING, check_groups, merge, preset
from diffusionblocks.tasks import CausalLM, RecurrentLM
from diffusionblocks.theory.partition import split_layers
from diffusionblocks.training.order import branch_steps, resolve_branch


@dataclass(frozen=True)
class Method:
    """description: one line. prepare: the recipe as this method runs it. build: its model from a network. adapts: it
    needs a pretrained network. trains: False for what only uses one."""

    description: str
    prepare: Callable[[Recipe], Recipe]
    build: Callable[[Recipe, Any], BlockModel]
    adapts: bool = False
    trains: bool = True

    @property
    def by_blocks(self) -> bool:
        """Whether blocks train in turns (looped networks and --num-blocks 1: the one block)."""
        return self.build in (_blocks_model, _exact_model)


def _blocks(recipe: Recipe) -> Recipe:
    """Branching would copy block 0 over the weights that a trained run or a pretrained network brings."""
    if not (recipe.model.start or recipe.model.pretrained):
        return recipe
    if recipe.train.branch_at:
        raise UserError(
            "train.branch_at copies block 0 over all others, and with them what model.start or model.pretrained "
            "brought; set it to 0"
        )
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, branch_at=0.0, own_batch=0))


def _one_block(recipe: Recipe) -> Recipe:
    train = dataclasses.replace(recipe.train, residency="device", order="sweep", branch_at=0.0, own_batch=0)
    return dataclasses.replace(recipe, train=train)


def _shallow(recipe: Recipe) -> Recipe:
    """Of a looped network: its layers once, which is what DiffusionBlocks trains."""
    recipe = _one_block(recipe)
    if isinstance(recipe.task, RecurrentLM):
        return dataclasses.replace(recipe, task=recipe.task.once())
    return recipe


def _checkpointing(recipe: Recipe) -> Recipe:
    recipe = _one_block(recipe)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, activation_checkpointing=True))


def _with_preset(name: str) -> Callable[[Recipe], Recipe]:
    """The recipe with a preset laid over it, as a method of its own."""

    def prepare(recipe: Recipe) -> Recipe:
        content = recipe.as_dict()
        if name not in recipe.task.presets:
            raise UserError(f"the method diffusionblocks-{name} is not for the task {recipe.task.kind}")
        changes = preset(content, name)
        content = merge(content, changes)
        if not content["train"]["branch_at"]:
            content = merge(content, {"train": {"own_batch": 0}})
        # All methods of a comparison draw their samples alike.
        kept = {"image-generation": ("sampler", "sampling_steps", "grid", "guidance", "label_dropout")}
        content = merge(content, {"task": {key: getattr(recipe.task, key) for key in kept.get(recipe.task.kind, ())}})
        changed = merge(content, recipe.methods.get(f"diffusionblocks-{name}", {}))
        return _blocks(build(changed, consented=recipe))

    return prepare


def _end_to_end_model(recipe: Recipe, network: Any) -> BlockModel:
    return whole_network(_parts(recipe, network), recipe.blocks)


def _parts(recipe: Recipe, network: Any) -> Parts:
    return take_apart(network, recipe.task.target)


def _shallow_model(recipe: Recipe, network: Any) -> BlockModel:
    parts = _parts(recipe, network)
    return whole_network(parts, recipe.blocks, len(split_layers(len(parts.layers), **_split(recipe))[0]))


def _blocks_model(recipe: Recipe, network: Any) -> BlockModel:
    return convert(network, **{**dataclasses.asdict(recipe.blocks), "target": recipe.task.target})


def _exact(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, branch_at=0.0, own_batch=0))


def _untrained(recipe: Recipe) -> Recipe:
    if not isinstance(recipe.task, CausalLM):
        raise UserError(f"the method {recipe.method} is for language models that write token by token (task causal-lm)")
    return _one_block(recipe)


def _mixed(recipe: Recipe) -> Recipe:
    if not isinstance(recipe.task, CausalLM):
        raise UserError("the method mixed is for language models that write token by token (task causal-lm)")
    recipe = _blocks(recipe)
    weight = recipe.blocks.ordinary or 1.0
    return dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, ordinary=weight))


def _exact_model(recipe: Recipe, network: Any) -> BlockModel:
    parts = _parts(recipe, network)
    return BlockCoordinateModel(parts, split_layers(len(parts.layers), **_split(recipe)))


def _lora_model(recipe: Recipe, network: Any) -> BlockModel:
    blocks = dataclasses.replace(recipe.blocks, target=recipe.task.target)
    # A classifier's readout is new; a pretrained one of tokens stays as it is, as usual.
    new = not isinstance(recipe.data, TextConfig)
    return lora_model(network, recipe.lora.rank, recipe.lora.alpha, train_readout=new, blocks=blocks)


def _last_block_model(recipe: Recipe, network: Any) -> BlockModel:
    parts = _parts(recipe, network)
    trained = len(split_layers(len(parts.layers), **_split(recipe))[-1])
    return whole_network(parts, recipe.blocks, trained_layers=trained)


def _split(recipe: Recipe) -> dict[str, Any]:
    return {"num_blocks": recipe.blocks.num_blocks, "sizes": recipe.blocks.layers_per_block}


METHODS: dict[str, Method] = {
    "end-to-end": Method("all layers at once, ordinary training", _one_block, _end_to_end_model),
    "checkpointing": Method(
        "end to end, activations recomputed in the backward pass", _checkpointing, _end_to_end_model
    ),
    "shallow": Method(
        "the first L/B layers end to end (looped networks: all layers, once): the same memory as a block",
        _shallow,
        _shallow_model,
    ),
    "diffusionblocks": Method("B blocks trained alone, the recipe's settings", _blocks, _blocks_model),
    "diffusionblocks-paper": Method(
        "B blocks with the paper's settings (preset paper)", _with_preset("paper"), _blocks_model
    ),
    "diffusionblocks-information": Method(
        "next-token blocks on the tokens alone (preset information)", _with_preset("information"), _blocks_model
    ),
    "diffusionblocks-features": Method(
        "next-token blocks on features of one another (preset features)", _with_preset("features"), _blocks_model
    ),
    "exact": Method("block-coordinate: the ordinary loss, one block's parameters at a time", _exact, _exact_model),
    "full": Method("fine-tunes all of a pretrained network", _one_block, _end_to_end_model, True),
    "lora": Method("low-rank adaptation of a pretrained network (peft)", _one_block, _lora_model, True),
    "last-block": Method("trains the last L/B layers of a pretrained network", _one_block, _last_block_model, True),
    "mixed": Method("B blocks, each on its own loss and on the ordinary one at the end", _mixed, _blocks_model, True),
    "original": Method("the pretrained network as it is", _untrained, _end_to_end_model, True, False),
    "prompt": Method("as it is, with training examples before every text", _untrained, _end_to_end_model, True, False),
    "retrieval": Method(
        "as it is, with the best passages of the training text before every text (BM25)",
        _untrained,
        _end_to_end_model,
        True,
        False,
    ),
}


# Of looped networks. Their `end-to-end` unrolls the core.
LOOPED = ("end-to-end", "checkpointing", "shallow", "full", "diffusionblocks", "diffusionblocks-paper")


def find_method(name: str) -> Method:
    """Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]


def for_method(recipe: Recipe, name: str) -> Recipe:
    """The recipe as method `name` runs it: with the recipe's own changes for that method, then the method's."""
    method = find_method(name)
    check_groups(recipe)
    if method.adapts and not recipe.model.pretrained:
        raise UserError(f"the method {name} adapts a pretrained network: set model.pretrained to its name or folder")
    if isinstance(recipe.task, RecurrentLM) and name not in LOOPED:
        raise UserError(f"the method {name} is not for looped networks; those that are: {', '.join(LOOPED)}")
    own = recipe.methods.get(name, {})
    if recipe.model.start or recipe.model.pretrained:  # such blocks do not branch, whatever is best for new ones
        kept = {key: value for key, value in own.get("train", {}).items() if key not in BRANCHING}
        own = {**own, "train": kept}
    recipe = build(merge(recipe.as_dict(), own), consented=recipe) if own else recipe
    return method.prepare(dataclasses.replace(recipe, method=name))


BUDGETS = ("layer-evaluations", "samples")


def steps_for_budget(recipe: Recipe, method: str, budget: str) -> int:
    """`train.steps` that gives `method` the budget of `recipe.train.steps` end-to-end steps.

    Args:
        recipe: the recipe as given (its steps are the end-to-end network's).
        budget: `layer-evaluations` (forward and backward passes of layers) or `samples` (loaded for training).
    """
    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}; got {budget!r}")
    prepared = for_method(recipe, method)
    steps, num_layers = recipe.train.steps, recipe.model.num_hidden_layers
    if recipe.model.pretrained:
        num_layers = pretrained_config(recipe.model.pretrained, recipe.model.trust_remote_code).num_layers
    if method in ("end-to-end", "checkpointing", "full", "lora") or not find_method(method).trains:
        return steps
    if isinstance(recipe.task, RecurrentLM):  # both pass every layer once in a step
        return (
            steps
            if budget == "samples"
            else round(steps * unrolled_layers(recipe.task, recipe.blocks, num_layers) / num_layers)
        )
    spans = split_layers(num_layers, **_split(recipe))
    if method == "shallow":
        return steps if budget == "samples" else round(steps * num_layers / len(spans[0]))
    if method == "last-block":
        passes = num_layers / 3 + len(spans[-1]) * 2 / 3
        return steps if budget == "samples" else round(steps * num_layers / passes)
    num_blocks, blocks, train = len(spans), prepared.blocks, prepared.train
    if budget == "layer-evaluations":
        passes = sum(_passes(prepared, span, num_layers) for span in spans)
        if method == "exact":
            passes = sum(layer_evaluations([len(span) for span in spans], train.order == "backward", train.graphs))
        elif (
            blocks.context == "features" and train.order != "sweep"
        ):  # forward passes of the blocks before, a third each
            before = sum(span.start for span in spans) / 3
            passes += before
        return round(steps * num_layers / passes)
    if train.order not in ("sweep", "backward"):
        return max(1, round(steps / num_blocks)) if train.order in ("random", "cyclic") else steps
    train = resolve_branch(train, method != "exact" and blocks.may_branch(spans))
    common = branch_steps(train, num_blocks)
    loaded_per_step = (common + train.steps - common // num_blocks) / train.steps
    return max(1, round(steps / loaded_per_step))


def _passes(recipe: Recipe, span: range, num_layers: int) -> float:
    """Layer evaluations per sample of a step of the block of these layers, on average over its steps."""
    blocks, target, after = recipe.blocks, recipe.task.target, num_layers - span.stop
    passes = blocks.evaluations(len(span), after == 0, target, after)
    heads = blocks.heads(after == 0, target) if blocks.context == "features" else 0
    if target != "causal" or not heads:
        return passes
    settling = len(span) / 3 + heads + (after / 3 if blocks.distill else 0)
    return passes + recipe.train.heads_first * (settling - passes)


def unrolled_layers(task: RecurrentLM, blocks: BlocksConfig, num_layers: int) -> float:
    """Layer evaluations per sample of training a looped network by unrolling it, on average."""
    made, trained = task.expected()
    return num_layers + (num_layers - blocks.prelude - blocks.coda) * (trained - 1 + (made - trained) / 3)
