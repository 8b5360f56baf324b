"""YAML as people expect it: the core schema of YAML 1.2, without what makes a small file large or hides a value."""

from __future__ import annotations

from typing import Any

import yaml

from diffusionblocks.errors import UserError


def parse(text: str, name: str) -> Any:
    """The content of a YAML text. name: of the file, for messages.

    Raises UserError where it is not valid YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def dump(content: Any) -> str:
    """The inverse of `parse`: keys stay in their order."""
    return yaml.safe_dump(content, sort_keys=False)
