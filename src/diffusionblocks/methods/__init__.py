"""How a network is trained, one method a file. A method declares itself (see `Method`); `METHODS` has all of them by
name, in the order of --help and of the table of `plan`: the package's own, and those of other packages."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

from diffusionblocks.errors import UserError
from diffusionblocks.methods.base import Method, names
from diffusionblocks.recipes import Recipe, build
from diffusionblocks.recipes.load import BRANCHING, check_groups, merge
from diffusionblocks.registry import Registry

__all__ = ["METHODS", "Method", "find_method", "for_method", "register_method"]

_FILES = (
    "end_to_end",
    "lora",
    "shallow",
    "last_block",
    "exact",
    "diffusionblocks",
    "mixed",
    "original",
    "in_context",
)


def _own() -> Iterator[Method]:
    for file in _FILES:
        yield from importlib.import_module(f"{__name__}.{file}").METHODS


METHODS: Registry[Method] = Registry("method", "diffusionblocks.methods", _own, names)


def register_method(method: Method) -> Method:
    """Makes a method known to recipes and to every command, by its name. Raises UserError where it misses a part or its
    name is taken."""
    return METHODS.register(method)


def find_method(name: str) -> Method:
    """Raises UserError for an unknown name."""
    return METHODS.find(name)


def for_method(recipe: Recipe, name: str) -> Recipe:
    """The recipe as method `name` runs it: with the recipe's own changes for that method, then the method's."""
    method = find_method(name)
    check_groups(recipe)
    if method.adapts and not recipe.model.pretrained:
        raise UserError(f"the method {name} adapts a pretrained network: set model.pretrained to its name or folder")
    if not (recipe.task.splits or method.loops):
        those = ", ".join(name for name, other in METHODS.items() if other.loops)
        raise UserError(f"the method {name} is not for looped networks; those that are: {those}")
    own = recipe.methods.get(name, {})
    if recipe.model.start or recipe.model.pretrained:  # such blocks do not branch, whatever is best for new ones
        kept = {key: value for key, value in own.get("train", {}).items() if key not in BRANCHING}
        own = {**own, "train": kept}
    recipe = build(merge(recipe.as_dict(), own), consented=recipe) if own else recipe
    return method.prepare(dataclasses.replace(recipe, method=name))
