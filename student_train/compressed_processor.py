"""A stock LLaVA processor that writes as many placeholders as a compressed student has vision tokens; saved, it is stock again."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any


def compress_processor(processor: Any, grid: tuple[int, int]) -> Any:
    """A twin of the processor that writes ``rows · columns`` placeholders a view; its ``vision_grid`` tells the layout."""
    return _rebuild_processor(getattr(type(processor), "stock_class", type(processor)), grid, vars(processor))


@lru_cache(maxsize=16)
def _processor_class(base: type, grid: tuple[int, int]) -> type:
    """A subclass that still has the stock name, which ``save_pretrained`` writes."""
    count = grid[0] * grid[1]

    def replace_image_token(self: Any, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * count

    def _get_num_multimodal_tokens(self: Any, image_sizes: Any = None, **kwargs: Any) -> Any:
        stock = base._get_num_multimodal_tokens(self, image_sizes, **kwargs)  # type: ignore[attr-defined]
        if image_sizes is not None:
            stock.num_image_tokens = [count] * len(image_sizes)
        return stock

    def reduce(self: Any, protocol: Any) -> Any:
        # Pickle finds a class by its name, which is the stock one's: loader processes rebuild this one.
        return _rebuild_processor, (base, grid, vars(self))

    def _get_number_of_features(self: Any, *sizes: Any) -> int:
        # Anyres: as if patches were as large as compressed tokens. sizes: of the image, then of a view.
        coarse = copy.copy(self)
        coarse.patch_size = sizes[2] // grid[0]
        return int(base._get_number_of_features(coarse, *sizes))  # type: ignore[attr-defined]

    counting = (
        {"_get_number_of_features": _get_number_of_features}
        if hasattr(base, "_get_number_of_features")
        else {"replace_image_token": replace_image_token, "_get_num_multimodal_tokens": _get_num_multimodal_tokens}
    )
    own = {
        **counting,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "stock_class": base,
        "vision_grid": grid,
    }
    return type(base.__name__, (base,), own)


def _rebuild_processor(base: type, grid: tuple[int, int], state: dict[str, Any]) -> Any:
    processor: Any = object.__new__(_processor_class(base, grid))
    vars(processor).update(state)
    return processor
