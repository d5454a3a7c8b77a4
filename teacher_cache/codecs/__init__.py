"""Arrays ↔ bytes, with no knowledge of models. A codec is named in ``field.json`` and found by folder, never guessed.

A row codec module defines ``NAME``, ``VERSION``, ``encode(rows [R, D]) -> {name: tensor}`` and
``decode({name: tensor}) -> float32 [R, D]``; ``container`` turns the tensors into the bytes of one tar member.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from teacher_cache.errors import CacheError


def row_codecs() -> dict[str, ModuleType]:
    """Every row codec by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in sorted(modules, key=lambda m: m.__name__) if hasattr(module, "NAME")}


def row_codec(name: str, version: int | None = None) -> ModuleType:
    """The codec of that name; CacheError naming the choices, or the version that this program cannot read."""
    codecs = row_codecs()
    if name not in codecs:
        raise CacheError(f"unknown codec {name!r}: this version of kdcli reads {', '.join(codecs)}")
    if version is not None and version != codecs[name].VERSION:
        raise CacheError(f"codec {name} version {version} is not readable: this kdcli reads {codecs[name].VERSION}")
    return codecs[name]
