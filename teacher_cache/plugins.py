"""Modules of other installed packages that serve as one of a folder's: found by entry points, so nobody edits an installation.

A package says so in its metadata (pyproject.toml), the module being what a file in the folder would be:

    [project.entry-points."kdcli.methods"]
    my-method = "my_package.my_method"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from teacher_cache.errors import KdcliError, one_line

Names = Callable[[ModuleType], Iterable[str]]
"""module → the names that it serves; AttributeError where it is none of the kind."""


def with_plugins(group: str, own: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Name → module: the folder's own, then those of packages.

    Raises:
        KdcliError: a plug-in cannot be imported, is none of the kind, or has a name that is taken; one line that names its package.
    """
    found = dict(own)
    for point in _points(group, tuple(sys.path)):
        module = _load(point)
        for name in _names_of(point, module, names):
            if name in found:
                other = "kdcli's own" if name in own else f"that of another plug-in ({found[name].__name__})"
                raise _refused(point, f"its name {name!r} is {other}: give it another name")
            found[name] = module
    return found


@lru_cache(maxsize=16)
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Sorted, so that a clash is always told of the same one. path: ``sys.path``, which decides what is installed."""
    return tuple(sorted(entry_points(group=group), key=lambda one: (one.name, one.value)))


def _load(point: EntryPoint) -> ModuleType:
    try:
        module = point.load()
    except (Exception, SystemExit) as error:  # whatever its import does
        raise _refused(point, f"it cannot be imported ({type(error).__name__}: {one_line(error)[:200]})") from None
    if not isinstance(module, ModuleType):
        raise _refused(point, "it names no module: leave out what stands behind the colon")
    return module


def _names_of(point: EntryPoint, module: ModuleType, names: Names) -> list[str]:
    try:
        return list(names(module))
    except AttributeError as error:
        raise _refused(point, f"the module has no {error.name}") from None


def _refused(point: EntryPoint, why: str) -> KdcliError:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return KdcliError(
        f"plug-in {point.name} of package {package} ({point.group}: {point.value}): {why}; update the package, or uninstall it"
    )
