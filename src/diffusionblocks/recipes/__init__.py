"""Recipes: everything a run needs, as one YAML file that can be copied and edited.

A recipe is completed in this order: the file, its preset, then the overrides of the command line. Unknown keys are
errors that name the nearest known key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from diffusionblocks.config import BlocksConfig
from diffusionblocks.data.config import DataConfig
from diffusionblocks.data.corpora import TextConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.tasks import CausalLM, Classification, ImageGeneration, MaskedLM, RecurrentLM
from diffusionblocks.training.config import TrainingConfig


@dataclass(kw_only=True)
class ModelConfig:
    """The network: a new one of `model_class` with these sizes, or a pretrained one.

    Args:
        model_class: a supported class of transformers or diffusers.
        pretrained: Hugging Face name, local folder, .gguf file, or package:NAME of an installed package that ships one; then only
            `dropout` and `attention` of the rest apply. trust_remote_code: run Python code that the hub's repository brings.
        intermediate_size: of the perceptron in a layer (4 * hidden_size in a DiT, whatever this says).
        patch_size: of networks that read images.
        start: folder of a trained run (or its model/) of the same network and split, whose weights this run starts from.
        attention: the attention implementation, `sdpa`, `eager` or, for text, `flex_attention` (GPU: a mask without a table).
    """

    model_class: str = "ViTForImageClassification"
    pretrained: str = ""
    trust_remote_code: bool = False
    start: str = ""
    hidden_size: int = 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 256
    patch_size: int = 4
    dropout: float = 0.0
    attention: str = "sdpa"


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adaptation: the update of a weight is alpha / rank * B A. All linear maps of the layers have one."""

    rank: int = 16
    alpha: int = 32


@dataclass(kw_only=True)
class InContextConfig:
    """What the methods `prompt` and `retrieval` put before a text, in tokens.

    Args:
        tokens: at most, in all. passage: of a passage of running text (conversations are whole). query: before a stretch, which
            passages are searched with. stride: length of a stretch; passages are searched anew for each.
    """

    tokens: int = 512
    passage: int = 128
    query: int = 64
    stride: int = 64

    def check(self) -> None:
        """Raises UserError for a number below 1."""
        for field_ in dataclasses.fields(self):
            if getattr(self, field_.name) < 1:
                raise UserError(f"in_context.{field_.name} must be at least 1, got {getattr(self, field_.name)}")


@dataclass(kw_only=True)
class Recipe:
    """One run.

    Args:
        method: a name of `baselines.METHODS`. preset: laid over the recipe.
        evaluate_on: `test`, or `validation` while tuning.
        task: `task.kind` chooses between `classification`, `image-generation`, `masked-lm`, `causal-lm` and `recurrent-lm`.
            data: `TextConfig` for text.
        presets: named changes. methods: changes for single methods, such as a baseline's own best learning rate.
    """

    name: str = "custom"
    description: str = ""
    method: str = "diffusionblocks"
    preset: str = ""
    evaluate_on: str = "test"
    data: DataConfig | TextConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    in_context: InContextConfig = field(default_factory=InContextConfig)
    task: Classification | ImageGeneration | MaskedLM | CausalLM | RecurrentLM = field(default_factory=Classification)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


TASKS: dict[str, Any] = {
    "classification": Classification,
    "image-generation": ImageGeneration,
    "masked-lm": MaskedLM,
    "causal-lm": CausalLM,
    "recurrent-lm": RecurrentLM,
}
DATA: dict[str, Any] = {
    "classification": DataConfig,
    "image-generation": DataConfig,
    "masked-lm": TextConfig,
    "causal-lm": TextConfig,
    "recurrent-lm": TextConfig,
}
TARGETS = {
    "classification": "label",
    "image-generation": "image",
    "masked-lm": "masked",
    "causal-lm": "causal",
    "recurrent-lm": "recurrent",
}

# What only the blocks of pretrained language models have.
_OF_PRETRAINED = {"head_start": "fresh", "distill": False, "ordinary": 0.0}

# What the paper describes and its released code does ([DB] sections 3 and 5, app. E), by task.
_PAPER: dict[str, dict[str, Any]] = {
    "classification": {
        "blocks": {
            "context": "input",
            "target_entry": "replace",
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 64,
        },
        "task": {"sampler": "euler", "decision": "final"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "image-generation": {
        "blocks": {"shared": "trained", "levels": "log-normal", "sigma_min": 0.002, "sigma_max": 80.0, "overlap": 0.05},
        "task": {"sampler": "euler", "sampling_steps": 50, "grid": "rho", "guidance": 2.0, "label_dropout": 0.1},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "masked-lm": {
        "blocks": {"shared": "trained", "schedule": "linear", "overlap": 0.1, "condition_width": 64},
        "task": {"masking": "independent", "loss_weight": "bound"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "causal-lm": {
        "blocks": {
            "context": "input",
            "target_entry": "replace",
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "overlap": 0.1,
            "head_layers": 0,
            "condition_width": 64,
            **_OF_PRETRAINED,
        },
        "task": {"sampler": "euler"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "recurrent-lm": {
        "blocks": {
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "condition_width": 64,
        },
        "task": {"sampler": "euler"},
    },
}

# Named changes that every recipe of a task has.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {kind: {"paper": changes} for kind, changes in _PAPER.items()}
PRESETS["causal-lm"] |= {
    # Every block reads the tokens; levels by information, exact evidence in the readout, ancestral sampling.
    "information": {
        "blocks": {
            "context": "input",
            "target_entry": "none",
            "readout": "bayes",
            "target_table": "fixed",
            "shared": "copies",
            "levels": "information",
            "least_hidden": 0.65,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 0,
            **_OF_PRETRAINED,
        },
        "task": {"sampler": "categorical"},
    },
    # Blocks on features of one another; the last one answers, and all of them are an ordinary language model. Hardly any
    # evidence (each is a complete predictor) and one readout for all measure best. A head layer (blocks.head_layers 1) helps at
    # equal samples and costs memory and a third more computation (docs/LOG.md).
    "features": {
        "blocks": {
            "context": "features",
            "target_entry": "none",
            "readout": "bayes",
            "target_table": "fixed",
            "shared": "trained",
            "levels": "information",
            "least_hidden": 0.97,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 0,
            **_OF_PRETRAINED,
        },
        "train": {"order": "sweep", "branch_at": 0.0},
    },
}


def preset(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The changes that preset `name` makes to a recipe. Raises UserError when there is no such preset."""
    own = content.get("presets", {})
    general = PRESETS[task_kind(content)]
    if name not in general | own:
        raise UserError(f"unknown preset {name!r}{nearest(name, general | own)}")
    return merge(general.get(name, {}), own.get(name, {}))


def task_kind(content: Mapping[str, Any]) -> str:
    """The kind of task of a recipe's content. Raises UserError for an unknown one."""
    group = content.get("task")
    kind = group.get("kind", "classification") if isinstance(group, Mapping) else "classification"
    if kind not in TASKS:
        raise UserError(f"unknown task.kind {kind!r}{nearest(str(kind), TASKS)}")
    return kind


BRANCHING = ("branch_at", "own_batch", "own_rate", "decay_from")  # settings of `train` that only branching runs have

SHORT_NAMES = {
    "num_blocks": "blocks.num_blocks",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "device": "train.device",
    "order": "train.order",
    "residency": "train.residency",
}


def built_in() -> dict[str, str]:
    """Names of the built-in recipes and their one-line descriptions."""
    files = {path.name: path for path in resources.files(__package__).iterdir() if path.name.endswith(".yaml")}
    contents = {name: _parse_yaml(files[name].read_text(), name) for name in sorted(files)}
    return {name.removesuffix(".yaml"): content["description"] for name, content in contents.items()}


def load_recipe(name_or_path: str, overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """A built-in recipe by name, or a YAML file, with its preset and `overrides` (dotted key, value) applied.

    Raises UserError for an unknown recipe, key or preset, or a value of the wrong type.
    """
    content = _read(name_or_path)
    check_keys(content)
    changes: dict[str, Any] = {}
    for key, value in overrides:
        full = SHORT_NAMES.get(key, key)
        _set(changes, full, _listed(full, value))
    check_keys(changes, task=task_kind(merge(content, changes)))
    name = changes.get("preset", content.get("preset", ""))
    if name:
        content = merge(content, preset(content, name))
    content = merge(content, changes)
    # What the user asks for wins over what the recipe prefers for single methods.
    taken = changes
    if changes.get("train", {}).get("branch_at") == 0:  # and what a recipe says about branching goes with it
        taken = merge(changes, {"train": dict.fromkeys(BRANCHING)})
    content["methods"] = {name: _without(own, taken) for name, own in content.get("methods", {}).items()}
    return build(content)


def changed(recipe: Recipe, overrides: Iterable[tuple[str, Any]], allowed: Sequence[str]) -> Recipe:
    """`recipe` with some settings changed. Raises UserError for a key that does not begin with an allowed one."""
    content = recipe.as_dict()
    for key, value in overrides:
        full = SHORT_NAMES.get(key, key)
        if full == "task.kind" or not full.startswith(tuple(allowed)):
            raise UserError(f"{full} cannot be changed after training; what can: {', '.join(allowed)}")
        _set(content, full, _listed(full, value))
    check_keys(content)
    return build(content)


def build(content: Mapping[str, Any]) -> Recipe:
    """A typed recipe from nested dicts. Raises UserError naming the key and what it needs."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    kinds = {"task": TASKS[task_kind(content)], "data": DATA[task_kind(content)]}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    rest = {key: value for key, value in content.items() if key not in kinds}
    try:
        parsed = parser.parse_object({"recipe": rest, **{name: dict(content.get(name, {})) for name in kinds}})
        made = parser.instantiate_classes(parsed)
        return _with_tokenizer(dataclasses.replace(made["recipe"], **{name: made[name] for name in kinds}))
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(str(error))) from None


def _with_tokenizer(recipe: Recipe) -> Recipe:
    """`data.tokenizer: auto` is that of the pretrained network."""
    if not isinstance(recipe.data, TextConfig) or recipe.data.tokenizer != "auto" or not recipe.model.pretrained:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=recipe.model.pretrained))


def check_keys(content: Mapping[str, Any], kind: Any = Recipe, prefix: str = "", task: str = "") -> None:
    """Raises UserError at the first key that `kind` does not have, naming the nearest one. task: kind of its task."""
    task = task or (task_kind(content) if kind is Recipe else "")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in content.items():
        if key not in fields:
            known = [prefix + name for name in fields] + ([] if prefix else list(SHORT_NAMES))
            raise UserError(f"unknown key {prefix + str(key)!r}{nearest(prefix + str(key), known)}")
        nested = {**_NESTED, "task": TASKS[task], "data": DATA[task]}.get(key) if kind is Recipe else None
        if nested is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{key} must be a group of keys, got {value!r}")
            check_keys(value, nested, f"{key}.")
        elif kind is Recipe and key in ("presets", "methods"):
            for changes in (value or {}).values():
                check_keys(changes, task=task)


_NESTED = {
    "model": ModelConfig,
    "blocks": BlocksConfig,
    "lora": LoraConfig,
    "in_context": InContextConfig,
    "train": TrainingConfig,
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, group by group."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _without(content: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    """`content` less the keys that `taken` has, group by group."""
    kept = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            nested = taken.get(key, {})
            kept[key] = _without(value, nested if isinstance(nested, Mapping) else {})
        elif key not in taken:
            kept[key] = value
    return kept


def _read(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe file {name_or_path} does not exist")
        return _parse_yaml(path.read_text(), str(path))
    resource = resources.files(__package__) / f"{name_or_path}.yaml"
    if "/" in name_or_path or not resource.is_file():
        raise UserError(f"unknown recipe {name_or_path!r}{nearest(name_or_path, built_in())} (or pass a YAML file)")
    return _parse_yaml(resource.read_text(), name_or_path)


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold keys and values, got {type(content).__name__}")
    return content


def _listed(key: str, value: Any) -> Any:
    """`0,2` or a single value for a key that takes a list -> the list."""
    group, _, name = key.partition(".")
    kinds = {"data": DATA, "task": TASKS}.get(group, {group: _NESTED.get(group)}).values()
    found = [own[name] for kind in kinds if name in (own := getattr(kind, "__dataclass_fields__", {}))]
    if not found or found[0].default_factory is not list or isinstance(value, list):
        return value
    parts = value.split(",") if isinstance(value, str) else [value]
    return [yaml.safe_load(part) if isinstance(part, str) else part for part in parts if part != ""]


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise UserError(f"{dotted}: {group} is a value, not a group of keys")
    content[last] = value


def _one_line(text: str) -> str:
    return " ".join(text.split())
