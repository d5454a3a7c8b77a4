"""Lets a torchvision that was built for CUDA be imported beside a CPU torch: the two operators that it describes are declared first.

For test environments alone, where vLLM imports torchvision and only a CUDA build of it is to be had. Run as a program it installs itself:
a ``.pth`` file imports this module in every process of the environment; torch itself is only imported where torchvision is.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """A finder that finds nothing; it only notices that torchvision is about to be imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import torch

            for operator in OPERATORS:
                torch.library.define(f"torchvision::{operator.partition('(')[0]}", f"({operator.partition('(')[2]}")


if __name__ == "__main__":
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, packages / "torchvision_shim.py")
    (packages / "torchvision_shim.pth").write_text("import torchvision_shim\n")
else:
    sys.meta_path.insert(0, DeclareOperators())  # type: ignore[arg-type]
