"""Implementations by name: those of this project, and those that other installed packages declare.

Services and backends are found through it. A package declares an implementation as an entry point `NAME =
module:attribute` of the group, and every process that has the package on its path finds it: server, batcher, worker.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: The groups of entry points.
SERVICES, BACKENDS = "mlg.services", "mlg.backends"


def extension_folders() -> list[Path]:
    """Return the folders of the packages that declare implementations, without importing them.

    They may lie outside Python's search path, where such a package is installed for development.
    """
    from importlib.metadata import entry_points

    points = [point for group in (SERVICES, BACKENDS) for point in entry_points(group=group)]
    specs = [importlib.util.find_spec(name) for name in {point.module.partition(".")[0] for point in points}]
    places = [(*(spec.submodule_search_locations or ()), spec.origin) for spec in specs if spec is not None]
    return [Path(place) for each in places for place in each if place]


class Extensions(Mapping[str, str]):
    """Name -> "module:attribute". A name of this project is never looked up elsewhere, which takes milliseconds.

    :param group: the group of entry points.
    :param built_in: the implementations of this project.
    """

    def __init__(self, group: str, built_in: Mapping[str, str]) -> None:
        self._group, self._built_in = group, built_in

    @functools.cached_property
    def _all(self) -> Mapping[str, str]:
        from importlib.metadata import entry_points  # imported here because it takes milliseconds

        found = {}
        for point in entry_points(group=self._group):
            try:
                point.load()
            except Exception:  # what the package of somebody else raises must not stop this project
                logger.exception("%s %r cannot be imported, so it is left out", self._group, point.name)
            else:
                found[point.name] = point.value
        return {**found, **self._built_in}

    def refresh(self) -> None:
        """Look for installed packages again at the next use."""
        self.__dict__.pop("_all", None)

    def load(self, name: str) -> Any:
        """Return the implementation with this name. :raises KeyError: there is none."""
        module, _, attribute = self[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __getitem__(self, name: str) -> str:
        return self._built_in[name] if name in self._built_in else self._all[name]

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
