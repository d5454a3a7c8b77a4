"""Every stage of a command held against what its folder holds, before anything is written: the same stage, and whole, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.train.stage_identity import (
    UNKNOWN,
    FoundStage,
    begun,
    check_same,
    settled_budget,
    stage_identity,
    start_hash,
)
from pipelines.train.stage_plans import StagePlan
from student_train.checkpoint import checkpoint_damage, checkpoints
from student_train.whole import FILES, added_files, finished_damage
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples


@dataclass(frozen=True)
class Checked:
    """A stage and what its folder holds.

    Attributes:
        there: None: nothing of it is trained.
    """

    plan: StagePlan
    folder: Path
    there: FoundStage | None

    @property
    def finished(self) -> bool:
        return self.there is not None and self.there.finished


def check_stages(
    cache: TeacherCache,
    plans: Sequence[StagePlan],
    start: str,
    output: Path,
    world: int,
    rows_of: Callable[[StagePlan], CachedSamples],
) -> list[Checked]:
    """What each stage's folder holds.

    Args:
        start: hash of what the first one begins with.

    Raises:
        KdcliError: one of them holds another stage than is asked for, or one that began from others.
    """
    before, checked = list[dict[str, Any]](), list[Checked]()
    for plan in plans:
        folder = plan.folder(output)
        there = begun(folder)
        rows = sum(rows_of(plan).counts)
        began, total, global_batch = settled_budget(plan, rows, world, there.identity if there else None)
        identity = stage_identity(cache, plan, total, global_batch, start, began)
        if there:
            check_same(folder, there, identity, before)
        checked.append(Checked(plan, folder, there))
        before.append({"folder": folder.name, "identity": identity})
        start = next_start(folder, there) if there and there.finished else UNKNOWN
    return checked


def next_start(folder: Path, there: FoundStage) -> str:
    """``start`` of the stage that begins with a finished one's model: as it was when it was written, where its record says so."""
    known = there.body.get("weights")
    if isinstance(known, str):
        return known
    return start_hash(str(folder / "model")) if any((folder / "model").glob("*.safetensors")) else UNKNOWN


def check_whole(checked: Sequence[Checked], say: Callable[[str], None]) -> list[Checked]:
    """The finished stages that have to be made again from a checkpoint, since their model is damaged and is needed.

    A damaged model that nobody begins from any more is a note: the stage behind it is finished.

    Raises:
        KdcliError: a needed one is damaged, and no checkpoint is whole; or files were added to it.
    """
    again = []
    for number, one in enumerate(checked):
        if not one.there or not one.finished:
            continue
        needed = one is checked[-1] or not checked[number + 1].finished
        if needed and FILES not in one.there.body:
            say(f"note: {one.folder} was finished by a version that wrote no sums: its model is not checked")
        if wrong := finished_damage(one.folder, one.there.body):
            if not needed:
                say(
                    f"note: {one.folder}: {wrong}: {checked[number + 1].folder}, which began from it, is finished and stays"
                )
                continue
            _check_can_be_made(one.folder, wrong)
            say(f"note: {one.folder}: {wrong}: the stage is finished again from its newest whole checkpoint")
            again.append(one)
        elif needed and (added := added_files(one.folder, one.there.body)):
            raise KdcliError(
                f"{one.folder}: the stage did not write {', '.join(added[:3])}, which loading the model may read: move that away"
            )
    return again


def _check_can_be_made(folder: Path, wrong: str) -> None:
    if any(not checkpoint_damage(path) for path in checkpoints(folder / "checkpoints")):
        return
    raise KdcliError(
        f"{folder}: {wrong}, and no checkpoint of the stage is whole: restore the file from a copy, or remove {folder} to train the "
        "stage again from its start"
    )


def chain_of(done: Mapping[str, Any], folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """A finished stage as the next one remembers it in ``before``."""
    return {"folder": folder.name, "identity": done["identity"], "card": dict(card), "result": done["result"]}
