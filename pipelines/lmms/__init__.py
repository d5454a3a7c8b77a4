"""kdcli's models in lmms-eval: the plug-in (``manifest`` by entry point, ``model``), what it understands of a request, task groups.

Nothing here but ``model`` needs lmms-eval, and nothing of kdcli imports that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""Folder of the task groups, for lmms-eval's ``--include_path``."""


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` announces; called by lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("kdcli", simple_class_path="pipelines.lmms.model.Kdcli")
