"""A folder as a registry: every module of it that has a ``NAME``, by that name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from teacher_cache.errors import KdcliError


def named_modules(package: str, path: Iterable[str]) -> dict[str, ModuleType]:
    """package, path: a package's ``__name__`` and ``__path__``."""
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)]
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


def choose(modules: dict[str, ModuleType], name: str, kind: str, otherwise: str = "") -> ModuleType:
    """The module of that name; KdcliError listing the choices."""
    if name not in modules:
        raise KdcliError(f"unknown {kind} {name!r}: choose from {', '.join(sorted(modules))}{otherwise}")
    return modules[name]
