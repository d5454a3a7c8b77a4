"""Where a stage's metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio; each is imported where it is asked for.

A tracker is watched: where it fails, that is one note, and training goes on without it. A package that is missing is refused before any
model loads. A resumed stage goes on with its run, and logs no step a second time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipelines.train.run_records import fits, read_record
from student_train.metrics_log import Tracker
from teacher_cache.errors import KdcliError, one_line
from teacher_cache.shards.schema import COUNT, misfit
from teacher_cache.whole_file import write_whole

MEMORY = "trackers.json"
"""In a stage's folder, by tracker: the run it goes on with, and the first step that it has not seen."""
_KNOWN = {"identity": str, "run": str, "next_step": COUNT}


@dataclass(frozen=True)
class TrackedStage:
    """A stage as trackers know it.

    Attributes:
        folder: of the stage; the run's folder is above it. first_step: of this start.
        identity: hash of what a checkpoint of the stage must agree with. config: resolved settings, JSON types only.
    """

    folder: Path
    first_step: int
    identity: str
    config: Mapping[str, Any]

    @property
    def group(self) -> str:
        """All stages of one run."""
        return self.folder.resolve().parent.name

    @property
    def name(self) -> str:
        return f"{self.group}/{self.folder.name}"


class Backend(Protocol):
    """One service, opened for one stage. It may raise whatever its library does.

    Attributes:
        replaces: it drops the steps behind ``first_step`` itself, so that they may be logged again.
    """

    replaces: bool

    def __init__(self, stage: TrackedStage, run: str): ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in the stage's folder ``tensorboard``."""

    replaces = True

    def __init__(self, stage: TrackedStage, run: str):
        from torch.utils.tensorboard import SummaryWriter

        _quiet_writer_threads()
        self.board = SummaryWriter(str(stage.folder / "tensorboard"), purge_step=stage.first_step)
        if not stage.first_step:
            self.board.add_text("config", f"```json\n{json.dumps(stage.config, indent=1)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def finish(self) -> None:
        self.board.close()


def _quiet_writer_threads() -> None:
    """TensorBoard's writer thread keeps what went wrong for the next call, which is told of it; Python would print a traceback besides."""
    before = threading.excepthook
    if getattr(before, "quiet", False):
        return

    def hook(told: threading.ExceptHookArgs) -> None:
        if not type(told.thread).__module__.startswith("tensorboard."):
            before(told)

    hook.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class Wandb:
    """A run of Weights & Biases, project ``WANDB_PROJECT`` or kdcli; ``WANDB_MODE=offline`` writes it below the stage's folder."""

    replaces = False

    def __init__(self, stage: TrackedStage, run: str):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kdcli"),
            id=run,
            name=stage.name,
            group=stage.group,
            resume="allow",
            config=dict(stage.config),
            dir=os.environ.get("WANDB_DIR", str(stage.folder)),
            settings=wandb.Settings(console="off"),  # the terminal is the progress bar's
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, project ``TRACKIO_PROJECT`` or kdcli: local, or in the Space that ``TRACKIO_SPACE_ID`` names."""

    replaces = False

    def __init__(self, stage: TrackedStage, run: str):
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "kdcli"),
            name=f"{stage.name}-{run}",  # a name is all that it finds a run again by
            group=stage.group,
            resume="allow",
            config=dict(stage.config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        self.run.finish()


BACKENDS: dict[str, type[Backend]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_trackers(names: Sequence[str]) -> None:
    """KdcliError naming the extra of the first package that is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder ``wandb`` of older runs is no package
            raise KdcliError(f"--report-to {name}: the package {name} is missing: pip install 'kdcli[{name}]'")


def open_trackers(names: Sequence[str], stage: TrackedStage, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers of one stage; ``say`` gets one line of each that fails, now or later."""
    return [Watched(name, stage, say) for name in names]


class Watched:
    """A tracker that cannot stop a training, and that sees every step once."""

    def __init__(self, name: str, stage: TrackedStage, say: Callable[[str], None]):
        self.name, self.file, self.say = name, stage.folder / MEMORY, say
        self.identity = stage.identity
        known = _read(self.file).get(name, {})
        # What another stage left in this folder is not gone on with.
        self.known = known if known.get("identity") == stage.identity else {}
        self.known = {"identity": stage.identity, "run": uuid.uuid4().hex[:12], "next_step": 0, **self.known}
        self.backend: Backend | None = None
        self._try(lambda: self._open(stage))

    def _open(self, stage: TrackedStage) -> None:
        self.backend = BACKENDS[self.name](stage, self.known["run"])
        if not self.backend.replaces:
            self._remember()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A step; one that the run has seen before it was killed is left out, since it would stand there twice."""
        if (backend := self.backend) is None or (step < self.known["next_step"] and not backend.replaces):
            return
        self._try(lambda: backend.log(step, values))
        self.known["next_step"] = step + 1
        if self.backend and not backend.replaces:
            self._remember()

    def finish(self) -> None:
        if backend := self.backend:
            self._try(backend.finish)

    def _remember(self) -> None:
        # A step's worth is never waited for: at worst a tracker sees a step twice behind a power cut.
        write_whole(self.file, json.dumps({**_read(self.file), self.name: self.known}) + "\n", durable=False)

    def _try(self, action: Callable[[], None]) -> None:
        """What a tracker prints goes to stderr: stdout is the command's own."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            self.backend = None
            told = one_line(f"{type(error).__name__}: {error}")
            self.say(f"note: {self.name} failed, training continues without it; metrics.jsonl has every step ({told})")


def _read(file: Path) -> dict[str, Any]:
    """What trackers remember; one whose memory is damaged remembers nothing, and begins a run of its own."""
    try:
        body = read_record(file, fits({}), "")
    except KdcliError:
        return {}
    return {name: one for name, one in body.items() if not misfit(one, _KNOWN)}
