"""YAML as people expect it: the core schema of YAML 1.2, without what makes a small file large or hides a value.

`yes`, dates and `012` have no second meaning: the first two are text, the last is refused. Anchors, aliases, merge
keys, tags, duplicate keys and keys that are no text are refused, and so is a text of more than 1 MB or with more than
20 levels. What `dump` writes, `parse` reads as it was.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

from diffusionblocks.errors import UserError

LONGEST = 1_000_000  # characters
DEEPEST = 20  # levels of nesting

_TEXT, _NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float"))
_MERGE, _ZERO = "tag:yaml.org,2002:merge", "!leading-zero"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
_PLAIN = {  # what a scalar without quotes is; anything else is text
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _ZERO: rf"[-+]?0[0-9]+(?:\.[0-9]*)?{_EXPONENT}",
    _INT: r"[-+]?(?:0|[1-9][0-9]*)",
    _FLOAT: rf"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?){_EXPONENT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    _MERGE: r"<<",
}
# PyYAML asks the patterns that are listed under a scalar's first character; under None are those for every one.
_RESOLVERS = {None: [(tag, re.compile(rf"\A(?:{pattern})\Z")) for tag, pattern in _PLAIN.items()]}


def parse(text: str, name: str) -> Any:
    """The content of a YAML text. name: of the file, for messages.

    Raises UserError where it is not valid YAML, or has what is refused, with the line.
    """
    if len(text) > LONGEST:
        raise UserError(f"{name} has {len(text)} characters; YAML of more than {LONGEST} is not read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{name} is not valid YAML{where}: {' '.join(what.split())}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def dump(content: Any) -> str:
    """The inverse of `parse`: keys stay in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS
    depth = 0

    def get_event(self) -> Any:
        """The next part of the text. What is refused is refused here, before anything is made of it: an anchor that is
        named often could make that large."""
        event = super().get_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"aliases (*{event.anchor}) are not read", event)
        if getattr(event, "anchor", None) is not None:
            raise _Refused(f"anchors (&{event.anchor}) are not read", event)
        if isinstance(getattr(event, "tag", None), str):
            raise _Refused(f"tags ({event.tag}) are not read", event)
        if isinstance(event, yaml.CollectionStartEvent):
            self.depth += 1
            if self.depth > DEEPEST:
                raise _Refused(f"more than {DEEPEST} levels are not read", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.depth -= 1
        return event

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                raise _Refused("merge keys (<<) are not read", key_node)
            if key_node.tag != _TEXT or not isinstance(key_node, yaml.ScalarNode):
                what = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "it"
                raise _Refused(f"a key must be text: put {what} in quotes", key_node)
            if key_node.value in found:
                raise _Refused(f"the key {key_node.value!r} stands there twice", key_node)
            found[key_node.value] = self.construct_object(value_node, deep=True)
        return found

    def construct_yaml_map(self, node: Any) -> Any:
        return self.construct_mapping(node)

    def construct_zero(self, node: Any) -> Any:
        raise _Refused(
            f"{node.value} begins with a zero: write {node.value.lstrip('+-0') or 0}, or put it in quotes", node
        )

    def construct_merge(self, node: Any) -> Any:
        raise _Refused("merge keys (<<) are not read", node)

    def construct_whole(self, node: Any) -> int:
        return int(node.value)

    def construct_truth(self, node: Any) -> bool:
        return node.value.lower() == "true"


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, where: Any) -> None:
        super().__init__(problem=problem, problem_mark=where.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor(_ZERO, _Loader.construct_zero)
_Loader.add_constructor(_MERGE, _Loader.construct_merge)
_Loader.add_constructor(_INT, _Loader.construct_whole)
_Loader.add_constructor(_BOOL, _Loader.construct_truth)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True  # an object that is met twice is written twice

    def represent_text(self, data: str) -> Any:
        return self.represent_scalar(_TEXT, data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
