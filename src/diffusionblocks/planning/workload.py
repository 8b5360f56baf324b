"""What is to be trained, free of how: the networks, batches and settings that predictions of memory are made for."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.splits import count_classes
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.methods import find_method, for_method
from diffusionblocks.methods.base import Step
from diffusionblocks.networks.config import NetworkConfig
from diffusionblocks.networks.registry import pretrained_config, take_apart
from diffusionblocks.planning.predict import Network, Predictor, Traces
from diffusionblocks.recipes import Recipe, load_recipe
from diffusionblocks.recipes.keys import SHORT_NAMES, places, today
from diffusionblocks.recipes.network import network_config, sample_shape
from diffusionblocks.recipes.schema import LoraConfig
from diffusionblocks.system.trust import trusted
from diffusionblocks.tasks import CausalLM
from diffusionblocks.theory.partition import Partition, split_layers
from diffusionblocks.training.config import TrainingConfig

_PLACES = places("causal-lm")
PLANNED = ("method", "train.batch_size", "blocks.num_blocks")  # settings that the printed command says itself


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained, free of how.

    Args:
        network: number of layers -> the Hugging Face network of that depth (called on the meta device).
        batch: number of samples -> batch. num_layers: L.
        recipe: as it is given. as_run: method -> the recipe as that method runs it.
        command: what every run starts with ("" = there is none).
    """

    network: Callable[[int], Any]
    batch: Callable[[int], dict[str, Tensor]]
    num_layers: int
    recipe: Recipe
    as_run: Callable[[str], Recipe]
    command: str

    def on(self, device: str) -> Workload:
        """The same, where training on the device `auto` means `device`."""

        def settled(method: str) -> Recipe:
            recipe = self.as_run(method)
            if recipe.train.device != "auto":
                return recipe
            return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, device=device))

        return dataclasses.replace(self, as_run=settled)

    def with_task(self, **options: Any) -> Workload:
        """The same with other options of the task."""

        def changed(method: str) -> Recipe:
            recipe = self.as_run(method)
            return dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, **options))

        return dataclasses.replace(self, as_run=changed)

    def train(self, method: str) -> TrainingConfig:
        """Training settings of a method."""
        return self.as_run(method).train

    def settled(self, choice: Choice) -> Recipe:
        """The recipe of a choice."""
        recipe = self.as_run(choice.method)
        changes: dict[str, Any] = {"activation_checkpointing": True} if choice.checkpointing else {}
        changes |= {"accumulation": choice.accumulation} if choice.accumulation > 1 else {}
        changes |= {"keep_graphs": choice.keep_graphs} if choice.keep_graphs else {}
        uneven = recipe.blocks.layers_per_block if choice.num_blocks == recipe.blocks.num_blocks else []
        return dataclasses.replace(
            recipe,
            train=dataclasses.replace(recipe.train, **changes),
            blocks=dataclasses.replace(recipe.blocks, num_blocks=choice.num_blocks, layers_per_block=uneven),
        )

    def split(self, choice: Choice) -> list[int]:
        """Layers of each block."""
        uneven = self.settled(choice).blocks.layers_per_block
        return [len(span) for span in split_layers(self.num_layers, choice.num_blocks, uneven)]

    def tied(self) -> bool:
        """Whether input and output embeddings are one."""
        with torch.device("meta"):
            return take_apart(self.network(min(2, self.num_layers)), self.recipe.task.target).tied


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row: a method with the options that change its memory. keep_graphs: 0 = as the training settings say."""

    method: str
    num_blocks: int = 1
    checkpointing: bool = False
    accumulation: int = 1
    keep_graphs: int = 0

    @property
    def label(self) -> str:
        return self.method + (" + checkpointing" if self.recomputed else "")

    @property
    def recomputed(self) -> bool:
        """Whether it recomputes activations, which its method alone would not."""
        return self.checkpointing and not find_method(self.method).recomputes


def from_recipe(recipe: Recipe, name: str, overrides: Sequence[tuple[str, Any]] = ()) -> Workload:
    """The workload of a recipe, from its text alone: neither data nor weights are loaded (a pretrained network's
    config is). name, overrides: what the command line called it and changed in it, for the command to repeat."""
    kept = [(key if key in SHORT_NAMES else today(key), value) for key, value in overrides]
    kept = [(key, value) for key, value in kept if today(key) not in PLANNED]
    flags = [word for key, value in kept for word in (f"--{key.replace('_', '-')}", shlex.quote(_word(value)))]
    if recipe.model.trust_remote_code or getattr(recipe.data, "trust_remote_code", False):
        flags.append("--trust-remote-code")
    data = recipe.data
    config = network_config(recipe, 0 if isinstance(data, TextConfig) else count_classes(data))
    if config.attention == "flex_attention":  # compiled kernels cannot be traced; the mask is all that differs
        config = dataclasses.replace(config, attention="sdpa")

    def batch(samples: int) -> dict[str, Tensor]:
        if isinstance(data, TextConfig):
            names = ["input_ids", *{"documents": ["segments"], "padded": ["attention_mask"]}.get(data.packing, [])]
            return {name: torch.zeros(samples, data.length, dtype=torch.long) for name in names}
        channels, size = sample_shape(data)
        images = torch.zeros(samples, channels, size, size)
        return {"pixel_values": images, "labels": torch.zeros(samples, dtype=torch.long)}

    return Workload(
        network=lambda num_layers: config.cut(num_layers).build(),
        batch=batch,
        num_layers=config.num_layers,
        recipe=recipe,
        as_run=functools.cache(lambda method: for_method(recipe, method)),
        command=" ".join(["dblocks train", shlex.quote(name), *flags]),
    )


def for_model(name_or_path: str, overrides: Sequence[tuple[str, Any]]) -> tuple[Workload, TrainingConfig]:
    """The workload of adapting a Hugging Face model, from its config alone, and its training settings.

    Raises UserError when the config cannot be read or its family is not supported.
    """
    consent = trusted().remote_code
    config = pretrained_config(name_or_path, consent)
    if "causal" in config.adapter.targets:
        return _language_model(name_or_path, config, overrides)
    name, size, channels = "images", "image_size", "num_channels"
    if "masked" in config.adapter.targets:
        raise UserError(f"{name_or_path} is an encoder: plan it through a recipe, --model.pretrained in mdlm-folder")
    if "image" in config.adapter.targets:
        name, size, channels = "dit-images", "sample_size", "in_channels"
    sizes = [("model.pretrained", name_or_path), ("data.image_size", config.get(size))]
    overrides = [*sizes, ("data.channels", config.get(channels)), *overrides]
    recipe = load_recipe(name, overrides, trust_remote_code=consent)
    recipe.train.check()
    work = from_recipe(recipe, name, overrides)
    if config.get(channels) not in (1, 3):  # it reads latents, and its config does not say of which autoencoder
        work = dataclasses.replace(work, command="")
    return work, recipe.train


def _language_model(
    name_or_path: str, network: NetworkConfig, overrides: Sequence[tuple[str, Any]]
) -> tuple[Workload, TrainingConfig]:
    """Adapting a causal language model: next-token loss, weights as they are stored, one sequence per step."""
    config = network.config
    settings = {today(key): value for key, value in overrides}
    length = settings.pop("sequence_length", min(2048, config.max_position_embeddings))
    if not isinstance(length, int) or not 2 <= length <= config.max_position_embeddings:
        raise UserError(f"--sequence-length must be 2 to {config.max_position_embeddings} tokens, got {length!r}")
    known = {key: place.removeprefix("train.") for key, place in _PLACES.items() if place.startswith("train.")}
    for key in settings:
        if key not in known:
            raise UserError(f"unknown key {key!r}{nearest(key, [*known, 'sequence_length'])}")
    defaults = {"batch_size": 1, "precision": "bf16-true", "residency": "host"}
    chosen = {known[key]: value for key, value in settings.items()}
    TrainingConfig(**{**defaults, **chosen}).check()
    adapt = load_recipe("adapt")
    order = chosen.get("order", adapt.methods[adapt.method]["train"]["order"])
    if order == "backward":  # what can go so does by itself, and nothing else can
        chosen.pop("order", None)
    train = TrainingConfig(**{**defaults, **chosen})
    in_one_pass = dataclasses.replace(train, order=order)
    in_one_pass.check()
    model = dataclasses.replace(adapt.model, pretrained=name_or_path)
    recipe = dataclasses.replace(adapt, model=model, task=CausalLM(), train=train, lora=LoraConfig())

    def batch(samples: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(samples, length, dtype=torch.long)}

    def as_run(method: str) -> Recipe:
        declared = find_method(method)
        own = in_one_pass if declared.one_pass else train
        return declared.prepare(dataclasses.replace(recipe, method=method, train=own))

    work = Workload(
        network=lambda num_layers: network.cut(num_layers).build(),
        batch=batch,
        num_layers=network.num_layers,
        recipe=recipe,
        as_run=as_run,
        command=_adapting(name_or_path, length, {**defaults, **chosen}),
    )
    return work, train


def _adapting(name: str, length: int, train: dict[str, Any]) -> str:
    """The command that adapts a language model to one's own data, with the training settings that were planned."""
    words = ["dblocks adapt", shlex.quote(name), "--data.path PATH", "--data.length", str(length)]
    words += ["--trust-remote-code"] if trusted().remote_code else []
    keys = {place: key for key, place in _PLACES.items()}
    for name, value in train.items():
        if f"train.{name}" not in PLANNED:
            words += [f"--{keys[f'train.{name}'].replace('_', '-')}", shlex.quote(_word(value))]
    return " ".join(words)


def _word(value: Any) -> str:
    """A setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def predictor(work: Workload, choice: Choice, traces: Traces | None = None) -> Predictor:
    """The predictor of one choice. traces: shared by the choices of one workload."""
    recipe = work.settled(choice)
    return Predictor(_network(work, choice, recipe), recipe.task.longest(), recipe.train, traces)


def _network(work: Workload, choice: Choice, recipe: Recipe) -> Network:
    method, sizes = find_method(choice.method), work.split(choice)

    def build(sizes: Sequence[int]) -> BlockModel:
        layers = sizes if recipe.task.splits else [work.num_layers]
        return method.build(_shaped(recipe, layers), work.network(sum(layers)))

    # Layers of a looped network differ in how often they are applied: they are traced as they are.
    steps = method.steps(recipe, sizes) if recipe.task.splits else [Step((1,))]
    alike = method.traced_as or method.name, recipe.task, _shaped(recipe, [1]).blocks, recipe.lora
    share = 1.0
    if recipe.task.target == "masked":  # the first block meets the most masks
        blocks, ranges = recipe.blocks, len(sizes) if method.denoises else 1
        share = Partition(blocks.masking(), ranges, blocks.overlap, blocks.borders).mean_mass(0)
    return Network(kind=repr(alike), build=build, batch=work.batch, steps=steps, masked_share=share)


def _shaped(recipe: Recipe, sizes: Sequence[int]) -> Recipe:
    """The recipe for a network of blocks of these sizes, as it is traced."""
    shape: dict[str, Any] = {"num_blocks": len(sizes), "layers_per_block": list(sizes) if recipe.task.splits else []}
    if recipe.task.target == "causal":
        shape["distill"] = False  # only while heads settle, which needs less
    if recipe.task.target != "masked":
        shape["levels"] = "log-normal"  # levels have no values here, and an information partition would want some
    return dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, **shape))
