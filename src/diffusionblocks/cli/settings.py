"""--help of commands that take the settings of a recipe: twenty that people set, and with --help-all every one.

What a setting means is said once, by the first sentence of its entry in its dataclass's docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

USUAL = (
    *("method", "data.path", "data.tokenizer", "data.length"),
    *("model.pretrained", "model.start", "model.num_hidden_layers", "blocks.num_blocks"),
    *("train.steps", "train.batch_size", "train.accumulation", "train.learning_rate", "train.optimizer"),
    *("train.precision", "train.order", "train.residency", "train.activation_checkpointing", "train.keep_graphs"),
    *("train.seed", "train.device"),
)  # what README, the recipes and docs/adapt.md set
TITLES = {
    "": "the run",
    "data": "data: where samples come from",
    "model": "model: the network",
    "blocks": "blocks: how the network becomes blocks",
    "noise": "noise: the levels of noise, and which block learns which",
    "local": "local: blocks that learn on losses of their own, with heads (language models on features)",
    "looped": "looped: networks whose core is applied many times (task.kind recurrent-lm)",
    "lora": "lora: the method lora",
    "in_context": "in_context: the methods prompt and retrieval",
    "task": "task: what is learned",
    "objective": "objective: the loss of the task",
    "sampling": "sampling: how the task draws samples, or answers",
    "evaluation": "evaluation: what is measured of a trained model",
    "train": "train: how it is learned",
}
WIDTH = 36  # columns of a setting's name


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of help. means: a sentence. choices, default: as a recipe has them, of all tasks."""

    key: str
    means: str
    choices: tuple[str, ...]
    default: str

    @property
    def group(self) -> str:
        return self.key.rpartition(".")[0]

    def line(self, name: str) -> str:
        choices = f" ({', '.join(self.choices)})" if self.choices else ""
        default = f" [{self.default}]" if self.default else ""
        return f"  --{name.replace('_', '-'):{WIDTH}} {self.means}{choices}{default}"


def add_help(parser: argparse.ArgumentParser) -> None:
    """-h, --help and --help-all; what they say is made only when one of them is asked for."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-h", "--help", action=_Help, help="show this message and exit")
    parser.add_argument("--help-all", action=_Help, help="show every setting of a recipe and exit")


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.epilog = every() if "--help-all" in self.option_strings else usual()
        parser.print_help()
        parser.exit()


def usual() -> str:
    """The settings that people set, and the methods."""
    from diffusionblocks.methods import METHODS
    from diffusionblocks.recipes.keys import SHORT_NAMES

    short = {full: name for name, full in SHORT_NAMES.items()}
    found = {setting.key: setting for setting in settings()}
    lines = ["settings (--name value) that people change, with [defaults]; --help-all lists the rest:"]
    lines += [found[key].line(short.get(key, key)) for key in USUAL]
    lines += ["", "methods:", *(f"  {name.ljust(27)} {method.description}" for name, method in METHODS.items())]
    return "\n".join(lines)


def every() -> str:
    """All settings, group by group."""
    from diffusionblocks.recipes.keys import SHORT_NAMES

    found = list(settings())
    lines = ["settings (--group.name value), with [defaults] where a recipe says nothing"]
    for group, title in TITLES.items():
        lines += ["", title, *(setting.line(setting.key) for setting in found if setting.group == group)]
    names = ", ".join("--" + name.replace("_", "-") for name in SHORT_NAMES)
    return "\n".join([*lines, "", f"these may go without their group: {names}"])


def settings() -> Iterator[Setting]:
    """Every setting of a recipe, once: those of several kinds of task or data with all their choices and defaults."""
    from diffusionblocks.recipes.keys import groups, places
    from diffusionblocks.recipes.schema import Recipe
    from diffusionblocks.tasks import TASKS

    own = {field.name: field for field in dataclasses.fields(Recipe)}
    for name in ("method", "preset", "evaluate_on"):
        yield _setting(name, [(Recipe, own[name])])
    owners: dict[str, dict[tuple[Any, str], None]] = {}  # of every key, the dataclasses that have it
    for task in TASKS:
        for key, place in places(task).items():
            group, field = place.split(".")
            owners.setdefault(key, {})[groups(task)[group], field] = None
    yield dataclasses.replace(_setting("task.kind", list(_fields(owners.pop("task.kind")))), default=Recipe().task.kind)
    for key, found in owners.items():
        yield _setting(key, list(_fields(found)))


def _setting(key: str, owners: Sequence[tuple[Any, dataclasses.Field[Any]]]) -> Setting:
    from diffusionblocks.options import limits_of

    choices = dict.fromkeys(choice for _, field in owners for choice in limits_of(field).choices)
    defaults = [word for word in dict.fromkeys(_word(_default(field)) for _, field in owners) if word]
    default = " or ".join(defaults) if len(defaults) <= 2 else "by task"
    means = next((text for kind, field in owners if (text := meanings(kind).get(field.name))), "")
    return Setting(key=key, means=means, choices=tuple(choices), default=default)


def _fields(owners: Iterable[tuple[Any, str]]) -> Iterator[tuple[Any, dataclasses.Field[Any]]]:
    for kind, name in owners:
        yield kind, next(field for field in dataclasses.fields(kind) if field.name == name)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _word(value: Any) -> str:
    """A default as a recipe has it; nothing for what is empty."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "" if value in ("", []) else str(value).strip("[]")


_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def meanings(kind: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say about its options: the first sentence of each entry below
    `Args:`, without marks and references."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        entry: list[str] = []
        lines = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")[2].splitlines()
        for line in lines:
            if match := _ENTRY.fullmatch(line):
                entry = match[1].split(", ")
                found.update(dict.fromkeys(entry, match[2]))
            elif line.startswith("     "):
                found.update({name: f"{found[name]} {line.strip()}" for name in entry})
            else:
                break
    return {name: _plain(text) for name, text in found.items()}


def _plain(text: str) -> str:
    """The first sentence of an entry."""
    sentence = re.split(r"(?<=[^.])\.(?= |$)", text)[0]
    return re.sub(r" \(\[\w+\]\)", "", sentence).replace("`", "")
