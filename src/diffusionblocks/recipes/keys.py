"""What recipes call their options: the face, in groups of keys, of dataclasses whose fields are flat.

A key such as `noise.sigma_min` names the field `sigma_min` of the dataclass that a `Recipe` has as `blocks`: the field
says so beside its default (`options.option`). Every other part of the package speaks of fields. Keys of earlier
versions (`blocks.sigma_min`, `task.sampler`) are read as well; keys of options that there are no longer are refused
with what decides now.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.options import key_of, shown
from diffusionblocks.recipes.schema import InContextConfig, LoraConfig, ModelConfig, Recipe
from diffusionblocks.tasks import TASKS
from diffusionblocks.training.config import TrainingConfig

SHORT_NAMES = {
    "num_blocks": "blocks.num_blocks",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "device": "train.device",
    "order": "train.order",
    "residency": "train.residency",
}
_SECTIONS = ("presets", "methods")  # named changes, each with keys of its own
_NESTED: dict[str, Any] = {
    "model": ModelConfig,
    "blocks": BlocksConfig,
    "lora": LoraConfig,
    "in_context": InContextConfig,
    "train": TrainingConfig,
}


@dataclass(frozen=True)
class Gone:
    """An option that there is no longer.

    Args:
        decides: what decides now, as a clause. same: (the value in an old run's recipe, that recipe) -> whether the run
            is what it would be today.
    """

    decides: str
    same: Callable[[Any, Mapping[str, Any]], bool] = lambda value, recipe: True


def _settled(value: Any, recipe: Mapping[str, Any]) -> bool:
    return value == ("hold" if recipe.get("train", {}).get("own_batch") else "branch")


GONE = {
    "train.own_rate": Gone(
        "after branching blocks keep train.learning_rate and its schedule", lambda value, recipe: value == 1
    ),
    "train.decay_from": Gone(
        "with train.own_batch the rate of a branching run falls after train.hold, without it from the branch", _settled
    ),
    "train.prefetch": Gone(
        "blocks in host memory are prefetched to a card that has room for a second one, blocks on disk are not"
    ),
    "blocks.target": Gone("task.kind decides what blocks estimate"),
}


def task_kind(content: Mapping[str, Any]) -> str:
    """The kind of task of a recipe's content. Raises UserError for an unknown one."""
    group = content.get("task")
    kind = group.get("kind", "classification") if isinstance(group, Mapping) else "classification"
    if not isinstance(kind, str) or kind not in TASKS:
        raise UserError(f"unknown task.kind {shown(kind)}{nearest(str(kind), TASKS)}")
    return kind


def groups(task: str) -> dict[str, Any]:
    """The dataclasses of a recipe for a kind of task, by the names that `Recipe` has for them."""
    return {**_NESTED, "task": TASKS[task], "data": TASKS[task].data}


def places(task: str) -> dict[str, str]:
    """Every key of a recipe for a kind of task -> the field that it names: `noise.sigma_min` -> `blocks.sigma_min`."""
    found = {}
    for group, kind in groups(task).items():
        for field in dataclasses.fields(kind):
            if (key := key_of(field, group)) is not None:
                found[key] = f"{group}.{field.name}"
    return found


def today(key: str) -> str:
    """A key, or a short name or an earlier version's name of one, as it is called now. Unknown ones stay as they
    are."""
    full = SHORT_NAMES.get(key, key)
    if any(full in places(task) for task in TASKS):
        return full
    for task in TASKS:
        for name, place in places(task).items():
            if place == full:
                return name
    return full


def owners(key: str) -> list[tuple[Any, str]]:
    """The dataclasses that have the option of a key, of any kind of task, and their fields' names."""
    name = today(key)
    if "." not in name:
        return [(Recipe, name)]
    found: dict[tuple[Any, str], None] = {}
    for task in TASKS:
        if place := places(task).get(name):
            group, field = place.split(".")
            found[groups(task)[group], field] = None
    return list(found)


def read(content: Mapping[str, Any], task: str = "", renamed: dict[str, str] | None = None) -> dict[str, Any]:
    """What a recipe's text says, as fields: the inverse of `written`. What is in fields already stays.

    Args:
        task: kind of its task, where the content does not say it. renamed: keys of earlier versions that were met are
            noted here, with their names of today.

    Raises UserError at the first key that there is not, naming the nearest one, or where a group has no keys.
    """
    task = task or task_kind(content)
    known, kinds = places(task), groups(task)
    names = {place: key for key, place in known.items()}
    called = {*kinds, *(key.split(".")[0] for kind in TASKS for key in places(kind))}
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in _SECTIONS:
            check_group(key, value)
            for name, changes in value.items():
                check_group(f"{key}.{name}", changes)
            found[key] = {name: read(changes, task, renamed) for name, changes in value.items()}
        elif key in called:
            check_group(key, value)
            if key in kinds:
                found.setdefault(key, {})
            for name, one in value.items():
                place = _place(f"{key}.{name}", task, known)
                if names[place] != f"{key}.{name}" and renamed is not None:
                    renamed[f"{key}.{name}"] = names[place]
                _put(found, place, one, names[place])
        elif key in _TOP:
            found[key] = value
        else:
            raise _unknown(str(key), known)
    return found


def _place(key: str, task: str, known: Mapping[str, str]) -> str:
    """The field that a key names, by its name of today or an earlier one. Raises UserError where there is none."""
    if key in GONE:
        raise UserError(f"{key} is no setting any more: {GONE[key].decides}")
    place = known.get(key, key)
    if place in known.values():
        return place
    if owners(key):
        raise UserError(f"unknown key {key!r} for the task {task}: other tasks have it")
    raise _unknown(key, known)


def _put(found: dict[str, Any], place: str, value: Any, key: str) -> None:
    group, name = place.split(".")
    into = found.setdefault(group, {})
    if name in into:
        raise UserError(f"{key} is given twice, once as {place}, its earlier name: give it once")
    into[name] = value


def written(content: Mapping[str, Any], task: str = "") -> dict[str, Any]:
    """A recipe's fields as its text has them. task: kind of its task, where the content does not say it."""
    task = task or task_kind(content)
    kinds, keys = groups(task), {place: key for key, place in places(task).items()}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in _SECTIONS:
            found[name] = {each: written(changes, task) for each, changes in value.items()}
        elif name not in kinds:
            found[name] = value
        else:
            for field, one in value.items():
                if (key := keys.get(f"{name}.{field}")) is not None:
                    group, last = key.split(".")
                    found.setdefault(group, {})[last] = one
    return found


def of_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's own recipe, which an earlier version may have written.

    Raises UserError for an option that there is no longer, where the run had a value that made a difference.
    """
    own = _section(_section(content, "methods"), str(content.get("method")))
    whole = merge(content, own)
    for key, gone in GONE.items():
        group, name = key.split(".")
        section = _section(whole, group)
        if name in section and not gone.same(section[name], whole):
            raise UserError(f"it has {key} {shown(section[name])}, which is no setting any more: {gone.decides}")
    return read(_without_gone(content))


def without_idle(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's text without those options that there are no longer whose values are what decides today; and their
    keys."""
    dropped: dict[str, None] = {}

    def settled(part: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(part)
        for key, gone in GONE.items():
            group, name = key.split(".")
            section = found.get(group)
            if isinstance(section, Mapping) and name in section and gone.same(section[name], whole):
                found[group] = {other: value for other, value in section.items() if other != name}
                dropped[key] = None
        return found

    own = settled(content, content)
    for name in _SECTIONS:
        if isinstance(section := content.get(name), Mapping):
            own[name] = {
                each: settled(changes, merge(content, changes)) if isinstance(changes, Mapping) else changes
                for each, changes in section.items()
            }
    return own, list(dropped)


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _without_gone(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        if f"{prefix}{key}" in GONE:
            continue
        if isinstance(value, Mapping):
            inside = "" if prefix in (f"{name}." for name in _SECTIONS) else f"{key}."
            value = _without_gone(value, inside)
        found[key] = value
    return found


def check_group(name: str, value: Any) -> None:
    """Raises UserError where a group of keys is something else."""
    if not isinstance(value, Mapping):
        raise UserError(
            f"{name} must be a group of keys, got {shown(value)}: leave it out where there is nothing to say"
        )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, group by group."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


_TOP = {field.name for field in dataclasses.fields(Recipe)} - {*_NESTED, "task", "data", *_SECTIONS}


def _unknown(key: str, known: Mapping[str, str]) -> UserError:
    """What to say of a key that there is not: the nearest one, whatever group or earlier name it was looked for in."""
    group, _, name = key.rpartition(".")
    if key in SHORT_NAMES:
        return UserError(f"unknown key {key!r} in a recipe; did you mean {SHORT_NAMES[key]!r}?")
    if not group:
        top = {*_TOP, *SHORT_NAMES, *(full.split(".")[0] for full in known), *_SECTIONS}
        return UserError(f"unknown key {key!r}{nearest(key, top)}")
    names = {**{place: full for full, place in known.items()}, **{full: full for full in known}}
    same = [full for full in known if full.rpartition(".")[2] == name]
    close = same or [names[near] for near in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
    if close:
        return UserError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    return UserError(f"unknown key {key!r}{nearest(key, [full for full in known if full.startswith(f'{group}.')])}")
