"""Options of a dataclass with their ranges: each declared once, beside its default, and checked before anything runs.

    steps: int = option(1000, least=1)
    betas: list[float] = option([0.9, 0.999], least=0, below=1, count=2)

`check_options` raises one line for the first value that has the wrong type, is no finite number, or lies outside of its
range. An option may also say which group of a recipe's keys it belongs to, where that is not its dataclass's own:

    sigma_min: float = option(0.002, above=0, group="noise")      # a recipe calls it noise.sigma_min
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionblocks.errors import UserError

LARGEST = 2**63 - 1  # of a whole number, either way: what files and tensors hold
_KEY = "diffusionblocks.range"
_PLACE = "diffusionblocks.place"


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a value, or each element of a list, may be. count: elements that a list must have."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    count: int | None = None

    def words(self) -> str:
        """The bounds as they follow `must be`; empty where there are none."""
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, *, group: str = "", key: str | None = "", **limits: Any) -> Any:
    """A field of a dataclass with a default. A list is copied for every object.

    Args:
        group: of a recipe's keys; empty = that of the dataclass. key: its name there; empty = the field's own, None =
            recipes cannot set it.
        limits: those of `Range`.
    """
    metadata = {_KEY: Range(**limits), _PLACE: (group, key)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any], group: str) -> str | None:
    """What a recipe calls an option of the dataclass that it calls `group`; None where it cannot set it."""
    own, key = field.metadata.get(_PLACE, ("", ""))
    if key is None:
        return None
    return f"{own or group}.{key or field.name}".lstrip(".")


def limits_of(field: dataclasses.Field[Any]) -> Range:
    """What the value of an option may be."""
    return field.metadata.get(_KEY, Range())


def check_options(group: str, options: Any) -> None:
    """Raises UserError at the first option of a dataclass that is not what its field declares. group: how a recipe
    calls it."""
    kind: Any = type(options)
    kinds = _kinds(kind)
    for field in dataclasses.fields(options):
        name = key_of(field, group) or f"{group}.{field.name}"
        check_value(name, getattr(options, field.name), kinds[field.name], limits_of(field))


def check_value(name: str, value: Any, kind: Any = int, limits: Range | None = None) -> None:
    """Raises UserError where a value is not of its kind (a type as an annotation has it) or outside of its limits."""
    limits = limits or Range()
    kinds = _alternatives(kind)
    found = next((kind for kind in kinds if _is(value, kind)), None)
    if found is None:
        raise UserError(f"{name} must be {_wanted(kinds, limits)}, got {shown(value)}")
    values = list(value) if _element(found) else [value]
    if _element(found) and limits.count not in (None, len(values)):
        raise UserError(f"{name} must have {limits.count} elements, got {len(values)}: {shown(value)}")
    for one in values:
        if isinstance(one, numbers.Real) and not isinstance(one, bool):
            _check_number(name, one, limits)
        if isinstance(one, str) and limits.choices and one not in limits.choices:
            raise UserError(f"{name} must be one of {', '.join(limits.choices)}; got {shown(one)}")


def _check_number(name: str, value: Any, limits: Range) -> None:
    if isinstance(value, numbers.Integral):
        if abs(int(value)) > LARGEST:
            raise UserError(f"{name} must be at most {LARGEST}, got a number of {len(str(abs(int(value))))} digits")
    elif not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {float(value)}")
    if not limits.holds(value):
        raise UserError(f"{name} must be {limits.words()}, got {shown(value)}")


def made(kind: Any, group: str, content: Mapping[str, Any]) -> Any:
    """A dataclass from the values of its options, checked. Whole numbers become floats where the field has such."""
    hints, values = _kinds(kind), {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in content.items():
        field = fields[name]
        key = key_of(field, group) or f"{group}.{name}"
        check_value(key, value, hints[name], limits_of(field))
        values[name] = _as(value, hints[name])
    return kind(**values)


def elements(kind: Any, name: str) -> Any:
    """The type of a list option's elements; None for an option that takes no list, or that the dataclass does not
    have."""
    found = [element for one in _alternatives(_kinds(kind).get(name)) if (element := _element(one))]
    return found[0] if found else None


def is_text(kind: Any, name: str) -> bool:
    """Whether an option is text and nothing else."""
    return _kinds(kind).get(name) is str


def is_number(kind: Any, name: str) -> bool:
    """Whether an option takes a single number, or null."""
    return bool({int, float, type(None)} & set(_alternatives(_kinds(kind).get(name))))


def shown(value: Any) -> str:
    """A value for a message: as YAML has it, and not too long."""
    text = (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- types


@functools.cache
def _kinds(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _alternatives(kind: Any) -> Sequence[Any]:
    """`float | None` -> (float, None's type)."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _element(kind: Any) -> Any:
    """`list[int]` -> int; None for what is no list."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def _is(value: Any, kind: Any) -> bool:
    if element := _element(kind):
        return isinstance(value, list | tuple) and all(_is(one, element) for one in value)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)


def _as(value: Any, kind: Any) -> Any:
    """A value that `_is` of one of these kinds, in that kind."""
    for one in _alternatives(kind):
        if _is(value, one):
            element = _element(one)
            return [_as(part, element) for part in value] if element else float(value) if one is float else value
    return value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_MANY = {int: "whole numbers", float: "numbers", str: "words"}


def _wanted(kinds: Sequence[Any], limits: Range) -> str:
    """What would be right, in words."""
    words = []
    for kind in kinds:
        if element := _element(kind):
            words.append(
                f"a list of {'' if limits.count is None else f'{limits.count} '}{_MANY.get(element, 'values')}"
            )
        elif kind is str and limits.choices:
            words.append(f"one of {', '.join(limits.choices)}")
        else:
            words.append(_WORDS.get(kind, "a group of keys"))
    bounds = limits.words()
    return " or ".join(words) + (f" ({bounds})" if bounds else "")


LONGEST_NAME = 100  # characters of a recipe's or a method's name


def check_file_name(key: str, name: str) -> None:
    """Raises UserError for a name that a run folder cannot have: it becomes a part of its path."""
    fine = (
        name.isprintable() and not set(name) & set("/\\") and not name.startswith(".") and 0 < len(name) <= LONGEST_NAME
    )
    if not fine:
        raise UserError(
            f"{key} must be a plain file name of at most {LONGEST_NAME} characters (no / or \\, no leading dot), got "
            f"{shown(name)}"
        )
