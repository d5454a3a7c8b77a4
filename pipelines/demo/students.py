"""The demo's students: SFT in its best schedule, and one that learns what the teacher wrote down, as two rows of a grid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipelines.ablate.cells import make_cells
from pipelines.ablate.grid import load_grid
from pipelines.ablate.run import AblateRequest, ablate
from pipelines.demo.write_world import WorldPaths
from pipelines.processes.cores import usable_cores
from teacher_cache.errors import KdcliError
from teacher_cache.whole_file import write_whole

STUDENT_START = Path(str(files("pipelines.demo") / "assets" / "student_start"))
SFT, DISTILLED = "sft", "kd"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    SFT: {"method": "sft", "stages": "PT,SFT"},
    DISTILLED: {"method": "kd", "stages": "PT,DFT", "set.reg": 0.0},
}
"""Row → what sets it apart. Start, rows, their order and steps are the same, each has a learning rate of its own.

With reg = 0 kd never sees a label.
"""
EVALUATION = "heldout"


@dataclass(frozen=True)
class Trained:
    """One student: its row and seed, its run folder, and its scores on the held-out questions."""

    row: str
    seed: int
    folder: Path
    scores: Mapping[str, Any]


def grid_text(
    world: WorldPaths,
    cache: str,
    batch_size: int,
    stages: Mapping[str, tuple[int, float]],
    seeds: Iterable[int] = (0,),
    variants: Mapping[str, Mapping[str, Any]] = VARIANTS,
) -> str:
    """A grid file for ``kdcli ablate``. stages: name → steps and learning rate. Paths are as given."""
    return f"""# The students of the demo, for `kdcli ablate` from the folder in which the demo was run.
cache = {json.dumps(cache)}
baseline = {json.dumps(SFT)}

[train]
student = {json.dumps(str(STUDENT_START))}
per_device_train_batch_size = {batch_size}
{"".join(_stage(name, *one) for name, one in stages.items())}
[[eval]]
name = {json.dumps(EVALUATION)}
path = {json.dumps(str(world.heldout))}
image_root = {json.dumps(str(world.images))}

[grid]
seed = {list(seeds)}
""" + "".join(map(_variant, variants, variants.values()))


def _stage(name: str, steps: int, learning_rate: float) -> str:
    return f"\n[stages.{name}]\nmax_steps = {steps}\nlearning_rate = {learning_rate}\n"


def _variant(name: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["", "[[variants]]", f"name = {json.dumps(name)}", *lines, ""])


def train_and_ask(grid: str, path: Path, out: Path, console: Any) -> list[Trained]:
    """Run the grid, which is written to ``path``, in processes side by side; what is finished is not trained again.

    Raises:
        KdcliError: a student that failed, with its last words.
    """
    import torch

    write_whole(path, grid)
    on_cpu = None if torch.cuda.is_available() else min(len(VARIANTS), usable_cores())
    failed: Sequence[Mapping[str, str]] = ablate(AblateRequest(path, out, workers=on_cpu, retry_failed=True), console)[
        "failed"
    ]
    if failed:
        raise KdcliError("; ".join(f"{one['name']}: {one['error']} (log: {one['log']})" for one in failed))
    cells = make_cells(load_grid(path), out)
    return [Trained(one.row, one.seed, one.folder, one.card()["results"][EVALUATION]["scores"]) for one in cells]
