"""A run: a recipe made ready, or read from its folder.

DIR/config.yaml  metrics.jsonl  summary.json  checkpoints/  model/
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from diffusionblocks.blocks.looped import LoopedNetwork
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel
from diffusionblocks.data.splits import Splits, load_splits, without_samples
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.folder import read_recipe, read_summary
from diffusionblocks.methods import find_method, for_method
from diffusionblocks.recipes import Recipe, changed
from diffusionblocks.recipes.keys import today
from diffusionblocks.recipes.network import build_network, network_config
from diffusionblocks.seeds import derive
from diffusionblocks.system.run_folder import SUMMARY
from diffusionblocks.training.task import Trained
from diffusionblocks.training.trainer import Trainer


class Run(NamedTuple):
    """A recipe made ready: data, model and trainer."""

    recipe: Recipe
    data: Splits
    model: BlockModel
    trainer: Trainer

    @property
    def split(self) -> Any:
        """The data set that the recipe evaluates on."""
        return self.data.test if self.recipe.evaluate_on == "test" else self.data.validation

    @property
    def trained(self) -> Trained[Any, Any]:
        """The run in the hands of its task. Inside of `trainer.averaged()` the weights are those that are
        evaluated."""

        method = find_method(self.recipe.method)

        def evaluate(split: Dataset) -> Any:
            return self.trainer.evaluate(method.scored(self.recipe, self.data, split))

        return Trained(self.model, self.data, self.recipe.data, self.trainer.device, evaluate)


def prepare(recipe: Recipe, output_dir: Path | None = None, data: Splits | None = None) -> Run:
    """Loads the data and builds network, model and trainer of a recipe.

    Raises UserError for everything in the recipe that cannot work together.
    """
    recipe = for_method(recipe, recipe.method)
    recipe.train.check()
    recipe.blocks.check(recipe.task.target)
    if recipe.evaluate_on not in ("test", "validation"):
        raise UserError(f"evaluate_on must be test or validation, got {recipe.evaluate_on!r}")
    network_config(recipe, 1)  # for what it raises, before any data is read
    data = data or load_splits(recipe.data, recipe.train.seed, mask=_masked(recipe), device=recipe.train.device)
    recipe.task.check_data(data.test if recipe.evaluate_on == "test" else data.validation)
    torch.manual_seed(derive(recipe.train.seed, "weights"))
    network = build_network(recipe, data.num_outputs)
    model = find_method(recipe.method).build(recipe, network)
    if recipe.model.start:
        _start(model, Path(recipe.model.start))
    trainer = Trainer(model, recipe.task, data.train, data.validation, recipe.train, output_dir=output_dir)
    if recipe.model.attention == "flex_attention" and trainer.device.type == "cpu":
        raise UserError("model.attention flex_attention cannot train on a CPU: take sdpa there")
    find_method(recipe.method).check(recipe, data, model)
    return Run(recipe, data, model, trainer)


def _masked(recipe: Recipe) -> bool:
    return recipe.task.target == "masked"


def _start(model: BlockModel, folder: Path) -> None:
    """Weights of a trained run. Raises UserError when they do not fit."""
    if not isinstance(model, DiffusionBlocksModel | LoopedNetwork):
        raise UserError(
            f"model.start is for blocks; a whole network starts from --model.pretrained {folder / 'model'} instead"
        )
    model.start_from(folder / "model" if (folder / "model").is_dir() else folder)


# What may differ from training when a finished run is evaluated or sampled.
LATER_KEYS = (
    *("objective.", "sampling.", "evaluation.", "task.", "evaluate_on"),
    *("train.device", "data.path", "data.cache_dir", "data.vae"),
)


def load_run(folder: Path, overrides: Iterable[tuple[str, Any]] = (), *, with_data: bool = True) -> Run:
    """A trained run from its folder.

    Args:
        overrides: settings (dotted key, value) that differ from the run's, among `LATER_KEYS`.
        with_data: False where only the model and the names of the classes are needed; a finished run has both.

    Raises UserError when there is no run or its checkpoints are damaged.
    """
    recipe = read_recipe(folder)
    overrides = list(overrides)
    asked = {today(name) for name, _ in overrides}
    for key in (today(f"task.{name}") for name in settled(recipe)):
        if key in asked:
            raise UserError(f"{key} cannot be changed: the method {recipe.method} applies its layers once")
    if recipe.model.start:  # the checkpoint has everything
        recipe.model.start, recipe.train.branch_at, recipe.train.own_batch = "", 0.0, 0
    changes: dict[str, Any] = {"tensorboard": False, "compile": False, "residency": "device"}
    if recipe.train.accumulation > 1:  # earlier versions took both, and kept one graph
        changes["keep_graphs"] = 1
    recipe.train = dataclasses.replace(recipe.train, **changes)
    recipe = changed(recipe, overrides, LATER_KEYS)
    data = None if with_data else _without_samples(recipe, folder)
    run = prepare(recipe, None, data)
    if find_method(recipe.method).trains and not run.trainer.restore(folder):
        raise UserError(f"{folder} holds no usable checkpoint; train it first")
    run.trainer.residency  # noqa: B018  (moves the blocks to the device)
    return run


def settled(recipe: Recipe) -> tuple[str, ...]:
    """Options of the task that the method has settled."""
    return recipe.task.repeats if find_method(recipe.method).once else ()


def _without_samples(recipe: Recipe, folder: Path) -> Splits | None:
    """Splits with nothing in them, for a model that is only to be run; None where the data must tell its classes."""
    train, path = for_method(recipe, recipe.method).train, folder / SUMMARY
    size = max(train.batch_size, train.own_batch)
    classes = read_summary(folder).get("classes") if path.is_file() else None
    return without_samples(recipe.data, size, mask=_masked(recipe), classes=classes)
