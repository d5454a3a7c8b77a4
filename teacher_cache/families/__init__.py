"""Model families: ONE FILE A FAMILY. A module of this folder that defines ``FAMILY`` is one; the folder is the registry.

Capture and training ask a family, never a model type: ``family_of(config)``. What has no file gets the generic answers of ``Family``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from teacher_cache.families.family import Family

GENERIC = Family()


@cache
def families() -> tuple[Family, ...]:
    """Every family that has a file."""
    modules = [import_module(f"{__name__}.{one.name}") for one in iter_modules(__path__)]
    return tuple(one.FAMILY for one in modules if hasattr(one, "FAMILY"))


@cache
def family_named(model_type: str) -> Family:
    return next((one for one in families() if model_type in one.model_types), GENERIC)


def family_of(config: Any) -> Family:
    """The family of a model with this configuration."""
    return family_named(getattr(config, "model_type", ""))


def layout_family(config: Any, processor: Any, inputs: Mapping[str, Any]) -> Family:
    """The family that cuts images as this processor does: the model's own, or any that recognises the processor's tensors."""
    own = family_of(config)
    return next((one for one in (own, *families()) if one.recognises(processor, inputs)), own)


@cache
def token_kinds() -> frozenset[str]:
    """Names of all inputs that say of each token whether it is an image's."""
    return frozenset(one.token_kinds for one in (GENERIC, *families()))
