"""What is to be trained, free of how: the networks, batches and settings that predictions of memory are made for."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.convert import convert
from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.kinds import whole_network
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.splits import count_classes
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.methods.lora import lora_model
from diffusionblocks.methods.methods import for_method
from diffusionblocks.networks.config import NetworkConfig
from diffusionblocks.networks.registry import pretrained_config, take_apart
from diffusionblocks.planning.predict import Network, Predictor, Step, Traces
from diffusionblocks.recipes import Recipe, load_recipe
from diffusionblocks.recipes.keys import SHORT_NAMES, places, today
from diffusionblocks.recipes.network import network_config, sample_shape
from diffusionblocks.system.trust import trusted
from diffusionblocks.tasks import CausalLM, RecurrentLM
from diffusionblocks.theory.partition import Partition, split_layers
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.task import Task

BLOCKWISE = ("exact", "diffusionblocks", "mixed")
_PLACES = places("causal-lm")
PLANNED = ("method", "train.batch_size", "blocks.num_blocks")  # settings that the printed command says itself


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained, free of how.

    Args:
        network: number of layers -> the Hugging Face network of that depth (called on the meta device).
        batch: number of samples -> batch. num_layers: L. blocks, task: settings of DiffusionBlocks and its objective.
        train: method -> training settings. pretrained: there are weights to adapt. lora: rank and alpha.
        train_readout: adapting trains a new readout. command: what every run starts with. layers: method -> layers per
            block, where a method has a split of its own (None: as `blocks` says).
    """

    network: Callable[[int], Any]
    batch: Callable[[int], dict[str, Tensor]]
    num_layers: int
    blocks: BlocksConfig
    task: Task
    train: Callable[[str], TrainingConfig]
    pretrained: bool
    lora: tuple[int, int]
    train_readout: bool
    command: str
    layers: Callable[[str], Sequence[int]] | None = None

    def on(self, device: str) -> Workload:
        """The same, where training on the device `auto` means `device`."""

        def settled(method: str) -> TrainingConfig:
            train = self.train(method)
            return dataclasses.replace(train, device=device) if train.device == "auto" else train

        return dataclasses.replace(self, train=settled)

    def settings(self, choice: Choice) -> TrainingConfig:
        """Training settings of a choice."""
        train = self.train(choice.method)
        if choice.checkpointing:
            train = dataclasses.replace(train, activation_checkpointing=True)
        if choice.accumulation > 1:
            train = dataclasses.replace(train, accumulation=choice.accumulation)
        return dataclasses.replace(train, keep_graphs=choice.keep_graphs) if choice.keep_graphs else train

    def split(self, choice: Choice) -> list[int]:
        """Layers of each block."""
        own = self.blocks.layers_per_block if self.layers is None else self.layers(choice.method)
        uneven = own if choice.num_blocks == self.blocks.num_blocks else None
        return [len(span) for span in split_layers(self.num_layers, choice.num_blocks, uneven)]

    def tied(self) -> bool:
        """Whether input and output embeddings are one."""
        with torch.device("meta"):
            return take_apart(self.network(min(2, self.num_layers)), self.blocks.target).tied


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
        extra = " + checkpointing" if self.checkpointing and self.method != "checkpointing" else ""
        return self.method + extra


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
        blocks=dataclasses.replace(recipe.blocks, target=recipe.task.target),
        task=recipe.task,
        train=lambda method: for_method(recipe, method).train,
        layers=lambda method: for_method(recipe, method).blocks.layers_per_block,
        pretrained=bool(recipe.model.pretrained),
        lora=(recipe.lora.rank, recipe.lora.alpha),
        train_readout=not isinstance(data, TextConfig),
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
    order = chosen.get("order", load_recipe("adapt").methods["exact"]["train"]["order"])
    if order == "backward":  # exact goes so by itself, and nothing else can
        chosen.pop("order", None)
    train = TrainingConfig(**{**defaults, **chosen})
    exact = dataclasses.replace(train, order=order)
    exact.check()

    def batch(samples: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(samples, length, dtype=torch.long)}

    def settings_of(method: str) -> TrainingConfig:
        if method in BLOCKWISE:
            return exact if method == "exact" else train
        return dataclasses.replace(train, residency="device", order="sweep")

    work = Workload(
        network=lambda num_layers: network.cut(num_layers).build(),
        batch=batch,
        num_layers=network.num_layers,
        blocks=dataclasses.replace(load_recipe("adapt").blocks, target="causal"),
        task=CausalLM(),
        train=settings_of,
        pretrained=True,
        lora=(16, 32),
        train_readout=False,
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
    train, sizes, task = work.settings(choice), work.split(choice), work.task
    if isinstance(task, RecurrentLM):
        task = task.once() if choice.method == "shallow" else task.longest()
    return Predictor(_network(work, choice, sizes), task, train, traces)


def _network(work: Workload, choice: Choice, sizes: list[int]) -> Network:
    method = "diffusionblocks" if choice.method.startswith("diffusionblocks") else choice.method
    kind = method if method in _BUILDERS else "end-to-end"
    build, count = _BUILDERS[kind], len(sizes)
    if isinstance(
        work.task, RecurrentLM
    ):  # its layers differ in how often they are applied: they are traced as they are
        own = f"{kind}, once" if method == "shallow" else kind
        return Network(
            kind=own, build=lambda sizes: build(work, [work.num_layers]), batch=work.batch, steps=[Step((1,))]
        )
    if kind == "diffusionblocks":
        if work.blocks.context == "input":
            steps = [Step((size,)) for size in sizes]
        else:  # one that hands on, and one that does not: the last block may have another head than those before it
            steps = [Step((1, size, 1), 1) for size in sizes]
            steps[0], steps[-1] = Step((sizes[0], 1)), Step((1, sizes[-1]), 1)
            steps = steps if count > 1 else [Step((sizes[0],))]
    elif kind in ("exact", "mixed"):  # layers after the active block keep their inputs, layers before it keep nothing
        after = [sum(sizes[index + 1 :]) for index in range(count)]
        steps = [Step((1, size, rest), 1) for size, rest in zip(sizes, after, strict=True)]
        steps[0], steps[-1] = Step((sizes[0], after[0])), Step((1, sizes[-1]), 1)
        if (
            kind == "exact" and work.train(choice.method).order == "backward"
        ):  # but for one layer, to hand gradients down
            steps = [Step((1, size, 1), 1) for size in sizes]
            steps[0], steps[-1] = Step((sizes[0], 1)), Step((1, sizes[-1]), 1)
        steps = steps if count > 1 else [Step((sizes[0],))]
    elif kind == "last-block":
        steps = [Step((work.num_layers - sizes[-1], sizes[-1]))]
    else:
        steps = [Step((sizes[0] if method == "shallow" else work.num_layers,))]
    share = 1.0
    if work.blocks.target == "masked":  # the first block meets the most masks
        split = count if kind == "diffusionblocks" else 1
        partition = Partition(work.blocks.masking(), split, work.blocks.overlap, work.blocks.borders)
        share = partition.mean_mass(0)
    return Network(kind=kind, build=lambda sizes: build(work, sizes), batch=work.batch, steps=steps, masked_share=share)


def _denoisers(work: Workload, sizes: Sequence[int]) -> BlockModel:
    shape: dict[str, Any] = {"num_blocks": len(sizes), "layers_per_block": list(sizes)}
    if work.blocks.target == "causal":
        shape["distill"] = False  # only while heads settle, which needs less
    if work.blocks.target == "recurrent":
        shape["layers_per_block"] = []
    if work.blocks.target != "masked":
        shape["levels"] = "log-normal"  # levels have no values here, and an information partition would want some
    return convert(work.network(sum(sizes)), **{**dataclasses.asdict(work.blocks), **shape})


def _mixed(work: Workload, sizes: Sequence[int]) -> BlockModel:
    blocks = dataclasses.replace(work.blocks, ordinary=work.blocks.ordinary or 1.0)
    return _denoisers(dataclasses.replace(work, blocks=blocks), sizes)


def _coordinate(work: Workload, sizes: Sequence[int]) -> BlockModel:
    spans = split_layers(sum(sizes), len(sizes), list(sizes))
    return BlockCoordinateModel(take_apart(work.network(sum(sizes)), work.blocks.target), spans)


def _whole(work: Workload, num_layers: int, **options: Any) -> BlockModel:
    return whole_network(take_apart(work.network(num_layers), work.blocks.target), work.blocks, **options)


_BUILDERS: dict[str, Callable[[Workload, Sequence[int]], BlockModel]] = {
    "diffusionblocks": _denoisers,
    "mixed": _mixed,
    "exact": _coordinate,
    "lora": lambda work, sizes: lora_model(
        work.network(sum(sizes)), *work.lora, train_readout=work.train_readout, blocks=work.blocks
    ),
    "last-block": lambda work, sizes: _whole(work, sum(sizes), trained_layers=sizes[-1]),
    "end-to-end": lambda work, sizes: _whole(work, sum(sizes)),
}
