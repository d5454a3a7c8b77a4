"""Compression of vision tokens where the projector stands: one file a compressor; the folder is the registry.

A compressor module defines ``NAME``, ``PAPER``, ``ELASTIC`` (one set of weights serves several counts), ``CHOOSES_LAYERS`` (which
hidden states of the vision tower it reads is a choice) and

- ``settle(spec, site) -> CompressorSpec``: every open choice made; CompatibilityError naming the counts that can be had;
- ``build(spec, site, projector) -> nn.Module``: features ``[images, side², layers·D_v]`` → tokens ``[images, vision_tokens, D_t]``,
  starting from the weights of the trained projector where it can use them;
- ``VERSION``, where weights of an earlier one would say something else;
- ``grid(spec) -> (rows, columns)`` of the tokens; ``training_grid(spec)``: the largest that a training step can draw.

Shape letters: P patches of an image (side²), M vision tokens after compression, D_v vision width, D_t text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from student_train.registry import choose, named_modules
from teacher_cache.plugins import with_plugins


@dataclass(frozen=True)
class CompressorSpec:
    """What was asked for, or (settled) what a student has.

    Attributes:
        name: of the compressor; "": the one that the student has.
        vision_tokens: of one image; None: a quarter of the patches.
        layers: hidden states of the vision tower that are read, counted as ``vision_feature_layer`` counts; empty: the compressor's choice.
        largest: most vision tokens that an elastic compressor can give; None: its own choice.
        optional: a method's default, which gives way to the compressor that a student has.
        version: of a compressor that has changed what its weights say, once settled.
    """

    name: str
    vision_tokens: int | None = None
    layers: tuple[int, ...] = ()
    largest: int | None = None
    optional: bool = False
    version: int | None = None

    def entry(self) -> dict[str, Any]:
        """JSON-able, for the model's configuration."""
        said = {name: value for name, value in asdict(self).items() if value and name != "optional"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> CompressorSpec:
        return cls(**{**entry, "layers": tuple(entry.get("layers", ()))})

    @property
    def count(self) -> int:
        """``vision_tokens`` of a settled spec."""
        assert self.vision_tokens is not None, "settle the spec first"
        return self.vision_tokens


@dataclass(frozen=True)
class Site:
    """Where a compressor is put.

    Attributes:
        side: patches along each side of an image. vision_width, text_width: of one layer's features, of the language model.
        layers: ``vision_feature_layer`` as it is. depth: layers of the vision tower.
    """

    side: int
    vision_width: int
    text_width: int
    layers: tuple[int, ...]
    depth: int


def compressor_modules() -> dict[str, ModuleType]:
    """Every compressor by name, those of installed packages too (``kdcli.compressors``)."""
    return with_plugins("kdcli.compressors", named_modules(__name__, __path__), _names)


def _names(module: ModuleType) -> tuple[str]:
    _ = module.PAPER, module.ELASTIC, module.CHOOSES_LAYERS, module.settle, module.build
    return (module.NAME,)


def compressor_module(name: str) -> ModuleType:
    """A compressor's module; KdcliError listing the choices."""
    return choose(compressor_modules(), name, "compressor", ", or none")
