"""Families whose processors need torchvision: it lies in a folder of its own (`make install`), so that all other tests run without it.

The packaged torchvision is built for CUDA. Beside the CPU build of torch two of its operators must be known by name before it is
imported; nothing here calls them.
"""

from __future__ import annotations

import importlib.util

import pytest

FOUND = importlib.util.find_spec("torchvision") is not None

if FOUND:
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FOUND:
        reason = "no torchvision: run these tests by `make test`, or with PYTHONPATH=.venv/torchvision"
        for item in items:
            if "families" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))
