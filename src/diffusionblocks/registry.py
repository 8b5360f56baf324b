"""Declarations by name: tasks, methods and network families, the package's own and those of others.

Another package declares one by an entry point (`[project.entry-points."diffusionblocks.methods"]`, NAME =
"module:OBJECT"), a script by `diffusionblocks.register_method(...)` and its like.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from diffusionblocks.errors import UserError, first_line, nearest

log = logging.getLogger("diffusionblocks")
T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Declarations of one kind, in the order in which they came; the package's own first.

    Args:
        what: the kind in words, such as `method`.
        group: of entry points, such as `diffusionblocks.methods`. They are loaded when somebody first asks; one that
            cannot be loaded, misses a part or takes a name that is taken is left out, with one warning that names it.
        own: the package's declarations, imported on first use.
        names: what a declaration is found by. Raises UserError, in one line, for one that misses a part.
    """

    def __init__(
        self, what: str, group: str, own: Callable[[], Iterable[T]], names: Callable[[Any], tuple[str, ...]]
    ) -> None:
        self.what, self.group, self._own, self._names = what, group, own, names
        self._found: dict[str, T] = {}
        self._loaded = False

    def register(self, declaration: T) -> T:
        """Adds a declaration and returns it. Raises UserError for one that misses a part or takes a name that is
        taken."""
        self._load()
        return self._add(declaration)

    def find(self, name: str) -> T:
        """Raises UserError for an unknown name."""
        if name not in self:
            raise UserError(f"unknown {self.what} {name!r}{nearest(name, self)}")
        return self[name]

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._found)

    def __len__(self) -> int:
        self._load()
        return len(self._found)

    def _add(self, declaration: T) -> T:
        names = self._names(declaration)
        for name in names:
            if self._found.get(name, declaration) is not declaration:
                raise UserError(f"there is a {self.what} {name!r} already: choose another name")
        self._found |= dict.fromkeys(names, declaration)
        return declaration

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            for declaration in self._own():
                self._add(declaration)
            self._load_plugins()
        except BaseException:  # Ctrl-C in the middle: the next one who asks begins anew
            self._loaded, self._found = False, {}
            raise

    def _load_plugins(self) -> None:
        for point in entry_points(group=self.group):
            try:
                self._add(point.load())
            except (Exception, SystemExit) as error:  # other people's code may raise anything, and commands go on
                package = "" if point.dist is None else f" of the package {point.dist.name}"
                log.warning("left out: the %s plugin %s%s: %s", self.what, point.name, package, first_line(error))
