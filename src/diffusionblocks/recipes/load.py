"""Recipes: everything a run needs, as one YAML file that can be copied and edited.

A recipe is completed in this order: the file, its preset, then the overrides of the command line. Unknown keys are
errors that name the nearest known key (keys.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.errors import UserError, nearest
from diffusionblocks.options import (
    LONGEST_NAME,
    check_file_name,
    check_options,
    check_value,
    elements,
    is_number,
    is_text,
    made,
    shown,
)
from diffusionblocks.recipes.keys import (
    SHORT_NAMES,
    groups,
    merge,
    owners,
    read,
    task_kind,
    today,
    without_idle,
    written,
)
from diffusionblocks.recipes.schema import Recipe
from diffusionblocks.system import plain_yaml
from diffusionblocks.system.trust import trusted
from diffusionblocks.tasks import TASKS

log = logging.getLogger("diffusionblocks")
MENTIONED = 3  # keys with another name than before, of those that one line names


def preset(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The changes that preset `name` makes to a recipe. Raises UserError when there is no such preset."""
    check_value("preset", name, str)
    own = content.get("presets", {})
    general = TASKS[task_kind(content)].presets
    if name not in (*general, *own):
        raise UserError(f"unknown preset {name!r}{nearest(name, (*general, *own))}")
    return merge(general.get(name, {}), own.get(name, {}))


BRANCHING = ("branch_at", "own_batch")  # settings of `train` that only branching runs have


def built_in() -> dict[str, str]:
    """Names of the built-in recipes and their one-line descriptions."""
    files = {path.name: path for path in resources.files(__package__).iterdir() if path.name.endswith(".yaml")}
    contents = {name: _parse_yaml(files[name].read_text(), name) for name in sorted(files)}
    return {name.removesuffix(".yaml"): content["description"] for name, content in contents.items()}


def load_recipe(
    name_or_path: str, overrides: Iterable[tuple[str, Any]] = (), *, trust_remote_code: bool = False
) -> Recipe:
    """A built-in recipe by name, or a YAML file, with its preset and `overrides` (dotted key, value) applied.

    Args:
        trust_remote_code: set the options of that name, of the model and of the tokenizer (within `trusting` only).

    Raises UserError for an unknown recipe, key or preset, or a value of the wrong type.
    """
    in_file, typed = dict[str, str](), dict[str, str]()  # keys of earlier versions
    content, dropped = without_idle(_read(name_or_path))
    content = read(content, renamed=in_file)
    changes: dict[str, Any] = {}
    for key, value in overrides:
        full = _renaming(key, typed)
        _set(changes, full, _listed(full, value))
    changes = read(changes, task_kind(merge(content, changes)), typed)
    _say_renamed({**typed, **in_file})
    if dropped:
        log.warning("%s: no setting any more; the run is the same without", ", ".join(dropped))
    name = changes.get("preset", content.get("preset", ""))
    if name != "":
        content = merge(content, preset(content, name))
    if trust_remote_code:
        of_text = issubclass(groups(task_kind(merge(content, changes)))["data"], TextConfig)
        names = ("model", "data") if of_text else ("model",)
        content = merge(content, {name: {"trust_remote_code": True} for name in names})
    content = merge(content, changes)
    # What the user asks for wins over what the recipe prefers for single methods.
    taken = changes
    if changes.get("train", {}).get("branch_at") == 0:  # and what a recipe says about branching goes with it
        taken = merge(changes, {"train": dict.fromkeys(BRANCHING)})
    content["methods"] = {name: _without(own, taken) for name, own in content.get("methods", {}).items()}
    return build(content)


def changed(recipe: Recipe, overrides: Iterable[tuple[str, Any]], allowed: Sequence[str]) -> Recipe:
    """`recipe` with some settings changed. Raises UserError for a key that does not begin with an allowed one."""
    content = written(recipe.as_dict())
    renamed: dict[str, str] = {}
    for key, value in overrides:
        full = _renaming(key, renamed)
        group, _, name = full.rpartition(".")
        if group:
            read({group: {name: value}}, recipe.task.kind)  # an unknown key is one, whatever may be changed
        if not full.startswith(tuple(allowed)):
            raise UserError(f"{full} cannot be changed after training; what can: {', '.join(allowed)}")
        _set(content, full, _listed(full, value))
    _say_renamed(renamed)
    return build(content)


def _renaming(key: str, renamed: dict[str, str]) -> str:
    """A key as it is called now; noted where an earlier version called it as it stands there."""
    full = today(key)
    if full != SHORT_NAMES.get(key, key):
        renamed[key] = full
    return full


def _say_renamed(renamed: Mapping[str, str]) -> None:
    """One line, however many keys have other names than before."""
    if not renamed:
        return
    first = ", ".join(f"{old} is now {new}" for old, new in list(renamed.items())[:MENTIONED])
    more = f", and so on for {len(renamed) - MENTIONED} more" if len(renamed) > MENTIONED else ""
    log.warning("%s%s (the old names are still read; dblocks train --help-all lists the new ones)", first, more)


def build(content: Mapping[str, Any], *, consented: Recipe | None = None) -> Recipe:
    """A typed recipe from nested dicts, of fields (`as_dict`) or as a recipe's text has them, with every option in its
    range.

    Args:
        consented: a recipe that somebody has agreed to run; None = what `trusting` says.

    Raises UserError naming the key and what it needs.
    """
    content = read(content)
    kinds = groups(task_kind(content))
    values = {key: made(kinds[key], key, value) if key in kinds else value for key, value in content.items()}
    recipe = Recipe(**{**{name: kind() for name, kind in kinds.items()}, **values})
    check_options("", recipe)
    check_file_name("name", recipe.name)
    if recipe.preset:
        check_file_name("preset", recipe.preset)
    recipe = _with_tokenizer(recipe)
    _check_trust(recipe, consented or Recipe())
    return recipe


def check_groups(recipe: Recipe) -> None:
    """Raises UserError for an option of the network, the data or adaptation that is outside of its range: of a recipe
    that Python made."""
    for name in ("model", "data", "lora", "in_context"):
        check_options(name, getattr(recipe, name))


def _check_trust(recipe: Recipe, agreed: Recipe) -> None:
    """Raises UserError where a recipe would run code that came with data and that nobody has agreed to."""
    given = trusted()
    data, before = recipe.data, agreed.data
    if not given.remote_code:
        old = agreed.model if agreed.model.trust_remote_code else None
        if recipe.model.trust_remote_code and (old is None or recipe.model.pretrained != old.pretrained):
            raise UserError(_untrusted("model.trust_remote_code", "Python code of its model", "--trust-remote-code"))
        wants = isinstance(data, TextConfig) and data.trust_remote_code
        agreed_to = isinstance(before, TextConfig) and before.trust_remote_code
        if wants and not (agreed_to and getattr(data, "tokenizer", "") == getattr(before, "tokenizer", "")):
            raise UserError(_untrusted("data.trust_remote_code", "Python code of its tokenizer", "--trust-remote-code"))
    inception = getattr(recipe.task, "inception", "")
    if inception and not given.inception and inception != getattr(agreed.task, "inception", ""):
        raise UserError(
            _untrusted(
                "evaluation.inception",
                f"the TorchScript file {inception}, which is code",
                "--trust-inception",
                "see that you know where it is from",
            )
        )


def _untrusted(key: str, what: str, flag: str, first: str = "read it first") -> str:
    return f"{key} asks to run {what}: {first}, then pass {flag} to this command (docs/security.md)"


def _with_tokenizer(recipe: Recipe) -> Recipe:
    """`data.tokenizer: auto` is that of the pretrained network."""
    if not isinstance(recipe.data, TextConfig) or recipe.data.tokenizer != "auto" or not recipe.model.pretrained:
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=recipe.model.pretrained))


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
    try:
        of_data = path.is_dir() and name_or_path in built_in()  # a folder that is called like a recipe
        is_file = path.suffix in (".yaml", ".yml") or (path.exists() and not of_data)
    except (OSError, ValueError):  # no name of a file: too long, or with a null character
        is_file = False
    if is_file:
        return _parse_yaml(_text_of(path), str(path))
    resource = resources.files(__package__) / f"{name_or_path}.yaml"
    if not set(name_or_path).isdisjoint("/\\\0") or len(name_or_path) > LONGEST_NAME or not resource.is_file():
        raise UserError(
            f"unknown recipe {shown(name_or_path)}{nearest(name_or_path, built_in())} (or pass a YAML file)"
        )
    return _parse_yaml(resource.read_text(encoding="utf-8"), name_or_path)


def _text_of(path: Path) -> str:
    """Raises UserError where a recipe file cannot be read."""
    if not path.exists():
        raise UserError(f"recipe file {path} does not exist")
    if not path.is_file():
        raise UserError(
            f"{path} is no file: a recipe is a YAML file, or the name of a built-in recipe (dblocks recipes)"
        )
    try:
        with path.open("rb") as stream:
            return stream.read(4 * plain_yaml.LONGEST + 1).decode("utf-8")  # the parser says what is too long
    except UnicodeDecodeError as error:
        if path.stat().st_size > 4 * plain_yaml.LONGEST:
            raise UserError(f"{path} is too large for a recipe") from None
        raise UserError(f"{path} is not valid UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the recipe file {path}: {error.strerror}") from None


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    content = plain_yaml.parse(text, name)
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold keys and values, got {type(content).__name__}")
    return content


def read_value(key: str, text: str) -> Any:
    """What a text on the command line means for an option: YAML, a list also with commas (`0,2`), and text as it is.

    Raises UserError for text that is not valid YAML.
    """
    found = owners(key)
    if any(is_text(kind, name) for kind, name in found):
        return text
    flag = f"--{key.replace('_', '-')}"
    try:
        if any(elements(kind, name) for kind, name in found):
            return _listed(key, text)
        return plain_yaml.parse(text, flag) if text else ""
    except UserError as error:
        raise UserError(str(error).replace("is not valid YAML, line 1", f"{shown(text)} cannot be read")) from None


def _listed(key: str, value: Any) -> Any:
    """`0,2` or a single value for a key that takes a list -> the list. An option that takes a number too keeps a single
    one."""
    options = owners(key)
    element = next((found for kind, name in options if (found := elements(kind, name))), None)
    if element is None or isinstance(value, list | tuple):
        return value
    flag = f"--{key.replace('_', '-')}"
    if isinstance(value, str):
        if value.startswith("["):
            return plain_yaml.parse(value, flag)
        parts = [part.strip() for part in value.split(",") if part.strip()]
        value = parts if element is str else [plain_yaml.parse(part, flag) for part in parts]
        if len(value) != 1:
            return value
        value = value[0]
    single = any(is_number(kind, name) for kind, name in options)
    return value if single else [value]


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, last = dotted.split(".")
    if groups and groups[0] in SHORT_NAMES:
        raise UserError(f"{dotted}: {groups[0]} is a value, not a group of keys")
    for group in groups:
        content = content.setdefault(group, {})
        if not isinstance(content, dict):
            raise UserError(f"{dotted}: {group} is a value, not a group of keys")
    content[last] = value
