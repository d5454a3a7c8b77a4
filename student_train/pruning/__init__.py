"""Vision tokens removed inside the language model, after its first layers. One file an operator; the folder is the registry.

An operator module defines ``NAME``, ``PAPER``, ``WANTS`` (what it ranks by, see ``Seen``: ``attention`` and ``keys`` of the layer before,
``own_attention`` of the pruned layer, ``normed`` states) and ``choose(seen, keep) -> int64 [keep]``. Optionally, see ``Pruning``:
``STAGES`` and ``DEFAULT_KEPT``, where it removes in steps, ``DEFAULT_LAYER``, ``kept(vision, removed)``, its own rounding of a fraction,
``EVERY_TURN``, where the last prompt token of every turn ranks, and ``RENUMBERS``, where the tokens that stay are numbered anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from student_train.registry import choose, named_modules
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.families import family_of
from teacher_cache.families.decoders import ATTENTION

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")

ONE_STAGE = ((0.0, 1.0),)
USUAL_LAYER = 2


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
            nothing is removed. An operator with several ``STAGES`` spreads them over the layers from K on. None: the operator's own,
            which is 2 or, with stages, 0.
        removed: fraction of each sample's vision tokens that is removed in the end, 0 <= removed < 1; what stays is rounded down, as
            the released codes do; one token at least stays.
        keep: vision tokens kept in the end for every image of a sample; with fewer there, nothing is removed. The tokens of a
            sample's images are ranked together. Exactly one of ``removed`` and ``keep``, or none where the operator has a
            ``DEFAULT_KEPT`` of its own.
    """

    operator: str
    layer: int = None  # type: ignore[assignment]  # never None after __post_init__
    removed: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        module = operator_module(self.operator)
        if self.layer is None:
            object.__setattr__(self, "layer", getattr(module, "DEFAULT_LAYER", USUAL_LAYER))
        lowest = 0 if "own_attention" in module.WANTS else 1
        if not isinstance(self.layer, int) or self.layer < lowest:
            why = "" if lowest == 0 else " (the layer before it ranks)"
            raise KdcliError(f"{self.operator}: compression layer must be at least {lowest}{why}, got {self.layer}")
        if self.removed is not None and self.keep is not None:
            raise KdcliError(f"{self.operator}: give the fraction removed or the tokens to keep, not both")
        if self.removed is None and self.keep is None and not hasattr(module, "DEFAULT_KEPT"):
            raise KdcliError(f"{self.operator}: give the number of vision tokens to keep per image, e.g. --keep 64")
        if self.keep is not None and (not isinstance(self.keep, int) or self.keep < 1):
            raise KdcliError(f"{self.operator}: keep at least 1 vision token per image, got {self.keep!r}")
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
        if text.model_type not in ATTENTION:
            raise CompatibilityError(
                f"vision tokens cannot be removed inside a {text.model_type} language model: known are {', '.join(ATTENTION)}"
            )
        if family_of(config).between_marks:
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
        module = operator_module(self.operator)
        if not vision or self.removed == 0.0:
            return vision
        if self.keep is not None:
            stay = int(self.keep * images * multiple)
        elif self.removed is None:
            stay = int(module.DEFAULT_KEPT * multiple * vision)
        elif hasattr(module, "kept"):
            stay = module.kept(vision, self.removed)
        else:
            stay = int((1 - self.removed) * multiple * vision)
        return min(vision, max(1, stay))


@dataclass(frozen=True)
class Descending:
    """A pruning whose layer comes down from the top of a model, whose height only the model knows, to ``pruning.layer``."""

    pruning: Pruning
    progress: float

    def at(self, layers: int) -> Pruning:
        """layer = round(L - progress·(L - lowest)); halves are rounded up."""
        layer = math.floor(layers - self.progress * (layers - self.pruning.layer) + 0.5)
        return replace(self.pruning, layer=layer)
