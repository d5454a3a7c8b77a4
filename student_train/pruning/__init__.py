"""Vision tokens removed inside the language model, after its first layers. One file an operator; the folder is the registry.

An operator module defines ``NAME``, ``PAPER``, ``WANTS`` (what of the layer before it ranks by: ``attention``, ``keys``, ``hidden``)
and ``choose(seen, keep) -> int64 [keep]``; optionally ``STAGES`` and ``DEFAULT_KEPT`` (see ``Pruning``), where it removes in steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from student_train.registry import choose, named_modules
from teacher_cache.errors import CompatibilityError, KdcliError

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Language models (``model_type``) whose layers are known well enough to take tokens out between them."""
BETWEEN_MARKS = ("idefics3", "smolvlm")
"""Models whose images are several runs of vision tokens: how many a sample has cannot be told from them."""
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")

ONE_STAGE = ((0.0, 1.0),)


def operator_modules() -> dict[str, ModuleType]:
    """Every operator by name."""
    return named_modules(__name__, __path__)


def operator_module(name: str) -> ModuleType:
    """An operator's module; KdcliError listing the choices."""
    return choose(operator_modules(), name, "compression operator")


@dataclass(frozen=True)
class Pruning:
    """How many vision tokens go, where, and who chooses.

    Attributes:
        operator: name of an operator.
        layer: K, counted from 0: layers 0..K-1 see every token, layer K and those after it the kept ones. At K = number of layers
            nothing is removed. An operator with several ``STAGES`` spreads them over the layers from K on.
        removed: fraction of each sample's vision tokens that is removed in the end, 0 <= removed < 1; one token at least stays.
        keep: vision tokens kept in the end for every image of a sample; with fewer there, nothing is removed. The tokens of a
            sample's images are ranked together. Exactly one of ``removed`` and ``keep``, or none where the operator has a
            ``DEFAULT_KEPT`` of its own.
    """

    operator: str
    layer: int = 2
    removed: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        module = operator_module(self.operator)
        if not isinstance(self.layer, int) or self.layer < 1:
            raise KdcliError(
                f"{self.operator}: compression layer must be at least 1 (the layer before it ranks), got {self.layer}"
            )
        if self.removed is not None and self.keep is not None:
            raise KdcliError(f"{self.operator}: give the fraction removed or the tokens to keep, not both")
        if self.removed is None and self.keep is None and not hasattr(module, "DEFAULT_KEPT"):
            raise KdcliError(f"{self.operator}: say how many vision tokens an image keeps, e.g. --keep 64")
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise KdcliError(f"{self.operator}: at least 1 vision token an image must be kept, got {self.keep!r}")
        if self.removed is not None and not 0.0 <= self.removed < 1.0:
            raise KdcliError(
                f"{self.operator}: the fraction removed must be at least 0 and below 1, got {self.removed:g}"
            )

    def check(self, config: Any, from_the_top: bool = False) -> None:
        """CompatibilityError or KdcliError where a model of this configuration cannot be pruned so. Needs no weights.

        Args:
            from_the_top: the layer may be the number of layers, where one that comes down begins and nothing is removed yet.
        """
        text = config.get_text_config()
        if text.model_type not in TEXT_MODELS:
            raise CompatibilityError(
                f"vision tokens cannot be removed inside a {text.model_type} language model: known are {', '.join(TEXT_MODELS)}"
            )
        if config.model_type in BETWEEN_MARKS:
            raise CompatibilityError(
                f"vision tokens cannot be removed inside {config.model_type}: its images are tiles between marks in the text"
            )
        if getattr(config, "image_token_id", None) is None:
            raise CompatibilityError(f"{config.model_type} has no image_token_id: there are no vision tokens to remove")
        if self.layer >= text.num_hidden_layers + from_the_top:
            raise KdcliError(
                f"{self.operator}: compression layer {self.layer} is outside the model, whose layers are 0 to "
                f"{text.num_hidden_layers - 1}: nothing would be removed"
            )

    def at(self, layers: int) -> Pruning:
        """What to do in a model of so many layers: this."""
        return self

    def depths(self, layers: int) -> dict[int, float]:
        """Layer → tokens that stay from it on, as a multiple of the final count; none where K is the number of layers."""
        stages = getattr(operator_module(self.operator), "STAGES", ONE_STAGE)
        found = {self.layer + int(share * (layers - self.layer)): multiple for share, multiple in stages}
        return {layer: multiple for layer, multiple in found.items() if layer < layers}

    def kept(self, vision: int, images: int, multiple: float = 1.0) -> int:
        """Vision tokens of a sample that stay. vision: how many it has; images: of how many images."""
        if not vision:
            return 0
        if self.keep is not None:
            final = float(self.keep * images)
        elif self.removed is not None:
            final = float(vision - round(self.removed * vision))
        else:
            final = operator_module(self.operator).DEFAULT_KEPT * vision
        return min(vision, max(1, round(final * multiple)))


@dataclass(frozen=True)
class Descending:
    """A pruning whose layer comes down from the top of a model, whose height only the model knows, to ``pruning.layer``."""

    pruning: Pruning
    progress: float

    def at(self, layers: int) -> Pruning:
        """layer = round(L - progress·(L - lowest)); halves are rounded up."""
        layer = math.floor(layers - self.progress * (layers - self.pruning.layer) + 0.5)
        return replace(self.pruning, layer=layer)
