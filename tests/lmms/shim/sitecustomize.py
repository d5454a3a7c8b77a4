"""On the path of test processes only. torchvision's packaged build may be for another torch (CUDA beside CPU); its operators then do not
load and its import fails, although nothing here calls them: they are declared, so that it imports. Where they load, nothing is done."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def declare_operators() -> None:
    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError):
            break
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_operators()
