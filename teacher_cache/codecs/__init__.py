"""Arrays ↔ bytes, with no knowledge of models. A codec is named in ``field.json`` and found by folder, never guessed.

A row codec module defines ``NAME``, ``VERSION``, ``encode(rows [R, D]) -> {name: tensor}`` and
``decode({name: tensor}) -> float32 [R, D]``, and ``WIDE`` where encoding holds products that are best done on the teacher's device;
``container`` turns the tensors into the bytes of one tar member. An older version is a module of its own with the same ``NAME``: fields
that were begun with it are read, gone on with and mended by it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

import torch

from teacher_cache.errors import CacheError


def row_codecs() -> dict[str, ModuleType]:
    """Every row codec by name, in its newest version."""
    return {module.NAME: module for module in sorted(_modules(), key=lambda m: (m.NAME, m.VERSION))}


def row_codec(name: str, version: int | None = None) -> ModuleType:
    """The codec of that name; CacheError naming the choices, or the version that this program cannot read.

    Args:
        version: None: the newest.
    """
    codecs = row_codecs()
    if name not in codecs:
        raise CacheError(f"unknown codec {name!r}: this version of kdcli reads {', '.join(codecs)}")
    if version is None:
        return codecs[name]
    readable = {one.VERSION: one for one in _modules() if name == one.NAME}
    if version not in readable:
        known = ", ".join(map(str, sorted(readable)))
        raise CacheError(f"codec {name} version {version} is not readable: this kdcli reads {known}")
    return readable[version]


def encode_rows(codec: ModuleType, rows: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """``codec.encode`` of rows ``[R, D]``, on ``device`` (the teacher's) where that pays; what is stored is on the CPU (or meta)."""
    stored = codec.encode(rows.to(device) if hasattr(codec, "WIDE") else rows)
    return {name: one if one.is_meta else one.cpu() for name, one in stored.items()}


@cache
def _modules() -> list[ModuleType]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return [module for module in modules if hasattr(module, "NAME")]
