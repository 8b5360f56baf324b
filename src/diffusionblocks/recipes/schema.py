"""What a recipe holds: its groups and their options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.options import check_options, key_of, option
from diffusionblocks.tasks import TASKS
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.task import Task


@dataclass(kw_only=True)
class ModelConfig:
    """The network: a new one of `model_class` with these sizes, or a pretrained one.

    Args:
        model_class: Class of transformers or diffusers of a new network.
        pretrained: Hugging Face name, folder, .gguf file or package:NAME of a pretrained network. Then only `dropout`
            and `attention` of the rest apply.
        trust_remote_code: Run Python code that the model's repository brings. In a recipe that is read from a file it
            holds only with --trust-remote-code on the command line.
        start: Folder of a trained run (or its model/) whose weights this run starts from. The same network and split.
        hidden_size: Width of the network.
        num_hidden_layers: Number of layers.
        num_attention_heads: Attention heads of a layer.
        intermediate_size: Width of the perceptron in a layer (a DiT always has 4 * hidden_size).
        patch_size: Pixels on each side of a patch, for networks that read images.
        dropout: Dropout of layers and attention.
        attention: The attention implementation. `flex_attention` is for text on a GPU: a mask without a table.
    """

    model_class: str = "ViTForImageClassification"
    pretrained: str = ""
    trust_remote_code: bool = False
    start: str = ""
    hidden_size: int = option(64, least=1)
    num_hidden_layers: int = option(12, least=1)
    num_attention_heads: int = option(4, least=1)
    intermediate_size: int = option(256, least=1)
    patch_size: int = option(4, least=1)
    dropout: float = option(0.0, least=0, below=1)
    attention: str = option("sdpa", choices=("sdpa", "eager", "flex_attention"))


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adaptation: the update of a weight is alpha / rank * B A. All linear maps of the layers have one.

    Args:
        rank: Rank of an update.
        alpha: Scale of an update: it is multiplied by alpha / rank.
    """

    rank: int = option(16, least=1)
    alpha: int = option(32, least=1)


@dataclass(kw_only=True)
class InContextConfig:
    """What the methods `prompt` and `retrieval` put before a text, in tokens.

    Args:
        tokens: Tokens that are put before a text, at most.
        passage: Tokens of a passage of running text (conversations are whole).
        query: Tokens before a stretch that passages are searched with.
        stride: Tokens of a stretch, before each of which passages are searched anew.
    """

    tokens: int = option(512, least=1)
    passage: int = option(128, least=1)
    query: int = option(64, least=1)
    stride: int = option(64, least=1)

    def check(self) -> None:
        """Raises UserError for a number below 1."""
        check_options("in_context", self)


@dataclass(kw_only=True)
class Recipe:
    """One run.

    Args:
        name: What run folders and reports call it.
        description: One line for dblocks recipes.
        method: What is trained, and how (see methods).
        preset: Named changes that are laid over the recipe.
        evaluate_on: Split that results are measured on. `validation` while tuning.
        task: What is learned; `task.kind` chooses between them.
        data: Where samples come from, `TextConfig` for text.
        presets: Named changes.
        methods: Changes for single methods, such as a baseline's own best learning rate.
    """

    name: str = "custom"
    description: str = ""
    method: str = "diffusionblocks"
    preset: str = ""
    evaluate_on: str = option("test", choices=("test", "validation"))
    data: DataConfig | TextConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    in_context: InContextConfig = field(default_factory=InContextConfig)
    task: Task = field(default_factory=lambda: TASKS["classification"]())
    train: TrainingConfig = field(default_factory=TrainingConfig)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Its fields as nested dicts, without those that no recipe can set."""
        found = dataclasses.asdict(self)
        for name in [name for name in found if dataclasses.is_dataclass(getattr(self, name))]:
            for entry in dataclasses.fields(getattr(self, name)):
                if key_of(entry, name) is None:
                    del found[name][entry.name]
        return found
