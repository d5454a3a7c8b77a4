"""Checkpoints: a folder a step, written by all processes in the background and renamed into place when complete.

The tensors are safetensors files of torch's distributed checkpoints, one a process and no pickle among them: any number of processes,
sharded or not, reads what any other number wrote. Beside them ``state.json``, sealed: the step, what the run must agree with, what it
was told, and every file's size and sha256, which are looked at before a checkpoint is continued.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from student_train.distributed import Processes
from student_train.whole import FILES, damage, make_folder, read_card, sums, unreadable, write_sealed
from teacher_cache.errors import KdcliError
from teacher_cache.planning.plan import difference
from teacher_cache.shards.local_disk import sync_folder
from teacher_cache.shards.schema import COUNT

# What one process is told of every checkpoint, and by a thread: there is nothing to do about it.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

STATE = "state.json"
NAME = re.compile(r"step-\d{7,}")
WEIGHTS, OPTIMIZER = "weights.", "optimizer."


def checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first: each was complete when it got its name."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def read_state(path: Path) -> dict[str, Any]:
    """``step``, ``identity`` and what else ``save`` wrote of a checkpoint; KdcliError where its ``state.json`` is damaged."""
    state = read_card(path / STATE, {"step": COUNT, "identity": dict}, f"remove {path.name} to continue without it")
    if path.name != f"step-{state['step']:07d}":
        raise KdcliError(
            f"{path / STATE}: damaged (it is of step {state['step']}): remove {path.name} to continue without it"
        )
    return state


def newest_state(folder: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint that has a readable one; None where there is no checkpoint.

    Raises:
        KdcliError: there are checkpoints, and none is readable.
    """
    first: KdcliError | None = None
    for path in reversed(checkpoints(folder)):
        try:
            return read_state(path)
        except KdcliError as error:
            first = first or error
    if first:
        raise first
    return None


def checkpoint_damage(path: Path) -> str:
    """What is wrong with a checkpoint, by its own sums; "" where nothing is, or where a version without sums wrote it."""
    if not (path / STATE).is_file():
        return f"{STATE} is missing"
    try:
        known = read_state(path).get(FILES)
    except KdcliError:
        return f"{STATE} differs from the written file"
    if known is None:
        return unreadable(path.glob("*.safetensors"))
    added = sorted(one.name for one in path.glob("*.safetensors") if one.name not in known)  # which would be read, too
    return damage(path, known) or (f"{added[0]} does not belong to it" if added else "")


class Checkpoints:
    """Reads and writes ``folder/step-N`` of one run; every process has one, and calls its methods in the same order.

    Args:
        identity: what a checkpoint must agree with to be continued. keep: how many stay; 0: all.
        card: what the run was told this time. before: of the stages that it began from; both are only kept.
        say: gets a note of each checkpoint that was left out since it is damaged, on the main process.
    Attributes:
        starts: ``[{"step", "card"}]``: with what the weights were trained from which step on; a start like the one before adds none.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        keep: int,
        processes: Processes,
        card: Mapping[str, Any] | None = None,
        before: list[Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.identity, self.keep, self.processes = identity, keep, processes
        self.card, self.before, self.say = dict(card or {}), before or [], say
        self.starts: list[dict[str, Any]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None

    def save(self, step: int) -> None:
        """Copy weights, optimizer state and step aside, and write them while training goes on; first waits for the one before."""
        self.wait()
        draft = self.folder / f".draft-{step:07d}"
        make_folder(draft)
        writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)  # which syncs its files
        saving = dcp.async_save(
            dict(self._tensors()),
            storage_writer=writer,
            process_group=self.processes.files,
            no_dist=self.processes.world == 1,
        )
        assert isinstance(saving, Future), "a stager of one's own alone returns something else"
        self._written = self._thread.submit(self._publish, saving, draft, step)

    def wait(self) -> None:
        """Until what was saved last is on disk; KdcliError where it could not be written."""
        written, self._written = self._written, None
        if written is not None:
            try:
                written.result()
            except (Exception, CheckpointException) as error:  # torch's own is no Exception
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise KdcliError(
                    f"{self.folder}: a checkpoint could not be written ({reason[-1]}): make room, or move --output-dir, and run the "
                    "command again; the checkpoint before it is intact"
                ) from None

    def load(self) -> int:
        """Restore the newest checkpoint that is whole and return the step to continue with; 0 where there is none.

        Damaged ones behind it are set aside as ``.damaged-step-N``, with a note.

        Raises:
            KdcliError: it is of another run; or there are checkpoints, and all are damaged.
        """
        step = self.processes.main_alone(self._choose)
        step = self.processes.told(step)[0]
        if step:
            path = self.folder / f"step-{step:07d}"
            self.starts = list(read_state(path).get("starts", []))
            self._read(path)
        if not self.starts or self.starts[-1]["card"] != self.card:
            self.starts.append({"step": step, "card": self.card})
        return step

    def _choose(self) -> int:
        """The step of the newest whole checkpoint, 0 for none."""
        for draft in self.folder.glob(".draft-*"):  # of a killed run
            shutil.rmtree(draft)
        found, damaged = checkpoints(self.folder), []
        for path in reversed(found):
            if wrong := checkpoint_damage(path):
                damaged.append((path, wrong))
                continue
            state = read_state(path)
            self._agree(path, state["identity"])
            if FILES not in state:
                self.say(f"note: {path} is of a version that wrote no sums: its files are not checked")
            for one, reason in damaged:
                self._set_aside(one, reason, path.name)
            return state["step"]
        if damaged:
            path, reason = damaged[0]
            raise KdcliError(
                f"{path}: damaged ({reason}), and no other checkpoint is whole: restore it from a copy, or remove {self.folder} "
                "to begin the stage again"
            )
        return 0

    def _set_aside(self, path: Path, reason: str, instead: str) -> None:
        """It must neither be counted as kept nor be taken for whole; what is in it may still be wanted."""
        aside = path.with_name(f".damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        self.say(f"note: {path} is damaged ({reason}): set aside as {aside.name}, the run continues from {instead}")

    # ---- how

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by its name in the checkpoint; hyper-parameters are recomputed from the settings, never stored."""
        for name, parameter in self._trained().items():
            yield WEIGHTS + name, parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{OPTIMIZER}{key}.{name}", value.reshape(1) if value.dim() == 0 else value

    def _publish(self, saving: Future[Any], draft: Path, step: int) -> None:
        """Behind the background write: every process sums what it wrote, and the main one publishes when all have."""
        saving.result()
        own = f"shard-{self.processes.rank + 1:05d}-*"
        try:
            said: dict[str, Any] = {FILES: sums(draft, [one.name for one in draft.glob(own)])}
        except OSError as error:
            said = {"error": str(error)}
        told = self.processes.told(said)
        if not self.processes.is_main:
            return
        if errors := [one["error"] for one in told if "error" in one]:
            raise OSError(errors[0])
        files = {name: one for each in told for name, one in each[FILES].items()}
        body = {"step": step, "identity": self.identity, "starts": self.starts, "before": self.before, FILES: files}
        write_sealed(draft / STATE, body)
        target = self.folder / f"step-{step:07d}"
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync_folder(self.folder)
        for old in checkpoints(self.folder)[: -self.keep] if self.keep else []:
            shutil.rmtree(old)

    def _agree(self, path: Path, there: dict[str, Any]) -> None:
        if there != self.identity:
            lines = "; ".join(difference(there, self.identity)).replace("cache ", "checkpoint ")
            raise KdcliError(
                f"{path} was made by another run: {lines}: choose another --output-dir, or remove the folder"
            )

    def _read(self, path: Path) -> None:
        """Weights and optimizer state, each process its own share of them."""
        reader = dcp.HuggingFaceStorageReader(str(path))
        try:
            stored = reader.read_metadata().state_dict_metadata
            sizes = {name: one.size for name, one in stored.items() if isinstance(one, TensorStorageMetadata)}
            tensors = self._targets(path, sizes)
            dcp.load(
                tensors, storage_reader=reader, process_group=self.processes.files, no_dist=self.processes.world == 1
            )
        except KdcliError:
            raise
        except Exception as error:  # of safetensors and of torch, each with its own types
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise KdcliError(
                f"{path}: damaged checkpoint ({reason[-1]}): remove that folder, the run continues from the one before"
            ) from None
        trained = self._trained()
        for name, tensor in tensors.items():
            if name.startswith(OPTIMIZER):
                key, parameter = name.removeprefix(OPTIMIZER).split(".", 1)
                scalar = tensor.reshape(()) if key == "step" else tensor
                self.optimizer.state[trained[parameter]][key] = scalar

    def _targets(self, path: Path, sizes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Where the stored tensors go: weights in place, optimizer state new, sharded as its parameter is."""
        trained = self._trained()
        weights = {name.removeprefix(WEIGHTS): size for name, size in sizes.items() if name.startswith(WEIGHTS)}
        if weights != {name: parameter.shape for name, parameter in trained.items()}:
            raise KdcliError(f"{path}: its trainable weights do not match this student")
        targets: dict[str, torch.Tensor] = {WEIGHTS + name: one.detach() for name, one in trained.items()}
        for name, size in sizes.items():
            if name.startswith(OPTIMIZER):
                parameter = trained[name.removeprefix(OPTIMIZER).split(".", 1)[1]]
                same = size == parameter.shape and ".step." not in f".{name.removeprefix(OPTIMIZER)}"
                targets[name] = torch.zeros_like(parameter) if same else torch.zeros(size)
        return targets
