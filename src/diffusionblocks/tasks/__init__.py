"""What a network is trained for, one task a file. A task declares itself (see `Task`); `TASKS` has all of them by kind,
the package's own and those of other packages.

Importing one task loads what that task needs, and nothing of the others.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_type_hints

from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError
from diffusionblocks.options import check_file_name, key_of
from diffusionblocks.registry import Registry
from diffusionblocks.training.figures import Figure
from diffusionblocks.training.task import Asked, Images, Made, Metric, Sampling, StepOutput, Task, Trained

if TYPE_CHECKING:
    from diffusionblocks.tasks.causal_lm import CausalLM
    from diffusionblocks.tasks.classification import Classification
    from diffusionblocks.tasks.image_generation import ImageGeneration
    from diffusionblocks.tasks.masked_lm import MaskedLM
    from diffusionblocks.tasks.next_token import NextToken
    from diffusionblocks.tasks.recurrent_lm import RecurrentLM

__all__ = [
    "TASKS",
    "Asked",
    "CausalLM",
    "Classification",
    "Figure",
    "ImageGeneration",
    "Images",
    "Made",
    "MaskedLM",
    "Metric",
    "NextToken",
    "RecurrentLM",
    "Sampling",
    "StepOutput",
    "Task",
    "Trained",
    "register_task",
]

_OWN = {
    "Classification": "classification",
    "ImageGeneration": "image_generation",
    "MaskedLM": "masked_lm",
    "CausalLM": "causal_lm",
    "RecurrentLM": "recurrent_lm",
}


def __getattr__(name: str) -> Any:
    module = {**_OWN, "NextToken": "next_token"}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _own() -> Iterator[type[Task]]:
    return (__getattr__(name) for name in _OWN)


def _kinds(task: Any) -> tuple[str, ...]:
    """The kind of a declared task. Raises UserError where it misses a part."""
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"a task is a subclass of diffusionblocks.tasks.Task, got {task!r}")
    if "__dataclass_fields__" not in vars(task):
        raise UserError(f"the task {task.__name__} is no dataclass: put @dataclass(kw_only=True) above it")
    missing = [part for part in ("kind", "target", "data") if not getattr(task, part, None)]
    missing += [part for part in ("step", "evaluate") if getattr(task, part) is getattr(Task, part)]
    missing += [
        f"a default of {field.name}"
        for field in dataclasses.fields(task)
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"the task {task.__name__} misses {', '.join(missing)}")
    from diffusionblocks.blocks.kinds import BLOCKS

    if task.target not in BLOCKS:
        raise UserError(f"the task {task.__name__} has the target {task.target!r}: it must be {' or '.join(BLOCKS)}")
    if not issubclass(task.data, DataConfig | TextConfig):
        raise UserError(f"the task {task.__name__} takes {task.data.__name__}: data must be DataConfig or TextConfig")
    _check_keys(task)
    return (task.kind,)


def _check_keys(task: type[Task]) -> None:
    """Raises UserError where an option of a task has a key that something else in a recipe has, or no type that can be
    told."""
    try:
        get_type_hints(task)
    except Exception as error:  # a name that is imported for type checkers alone
        raise UserError(f"the task {task.__name__} has an option whose type cannot be told: {error}") from None
    check_file_name(f"the kind of the task {task.__name__}", task.kind)
    for field in dataclasses.fields(task):
        key = key_of(field, "task")
        if key is not None and key.split(".")[0] not in ("task", "objective", "sampling", "evaluation"):
            own = f"the task {task.__name__} calls its option {field.name} {key}"
            raise UserError(f"{own}: the group of a task's option is objective, sampling or evaluation (or none)")


TASKS: Registry[type[Task]] = Registry("task", "diffusionblocks.tasks", _own, _kinds)


def register_task(task: type[Task]) -> type[Task]:
    """Makes a task known to recipes and to every command, by its `kind`; also a decorator.

    Args:
        task: a dataclass that declares what `Task` says.

    Raises UserError for one that misses a part, or whose kind is taken.
    """
    return TASKS.register(task)
