"""Checkpoints: a folder a step, written by all processes in the background and renamed into place when complete.

The tensors are safetensors files of torch's distributed checkpoints, one a process and no pickle among them: any number of processes,
sharded or not, reads what any other number wrote. Beside them ``state.json``: the step, and what the run must agree with.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from student_train.distributed import Processes
from teacher_cache.errors import KdcliError
from teacher_cache.plan import difference
from teacher_cache.shards.schema import COUNT, misfit
from teacher_cache.shards.storage import sync_folder

# What one process is told of every checkpoint, and by a thread: there is nothing to do about it.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

WEIGHTS, OPTIMIZER = "weights.", "optimizer."


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def read_state(path: Path) -> dict[str, Any]:
    """``step`` and ``identity`` of a checkpoint; KdcliError where its ``state.json`` is damaged."""
    return read_card(path / "state.json", {"step": COUNT, "identity": dict})


def read_card(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """A JSON document that a run left beside its files; KdcliError naming it where it is damaged or of another shape."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise KdcliError(f"{path}: damaged ({error}): remove its folder to do that part again") from None
    if wrong := misfit(body, shape):
        raise KdcliError(f"{path}: {wrong}: it was not written by kdcli; remove its folder to do that part again")
    return body


class Checkpoints:
    """Reads and writes ``folder/step-N`` of one run; every process has one, and calls its methods in the same order.
    Args:
        identity: what a checkpoint must agree with to be continued. keep: how many stay.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        keep: int,
        processes: Processes,
    ):
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.identity, self.keep, self.processes = identity, keep, processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None

    def save(self, step: int) -> None:
        """Copy weights, optimizer state and step aside, and write them while training goes on; first waits for the one before."""
        self.wait()
        draft = self.folder / f".draft-{step:07d}"
        draft.mkdir(parents=True, exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
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
        """Restore the newest checkpoint and return the step to continue with; 0 where there is none.

        Raises:
            KdcliError: it is damaged, or of another run.
        """
        if self.processes.is_main:
            for draft in self.folder.glob(".draft-*"):  # of a killed run
                shutil.rmtree(draft)
        found = checkpoints(self.folder)
        step = self.processes.of_main(read_state(found[-1])["step"] if found else 0)
        if not step:
            return 0
        path = self.folder / f"step-{step:07d}"
        self._agree(path, read_state(path)["identity"])
        self._read(path)
        return step

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
        """Behind the background write, which ends on the main process only when it has ended on all."""
        saving.result()
        if not self.processes.is_main:
            return
        target = self.folder / f"step-{step:07d}"
        (draft / "state.json").write_text(
            json.dumps({"step": step, "identity": self.identity}, indent=1, sort_keys=True)
        )
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync_folder(self.folder)
        for old in checkpoints(self.folder)[: -self.keep]:
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
                f"{path}: damaged checkpoint ({reason[-1]}): remove that folder, the run goes on from the one before"
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
            raise KdcliError(f"{path}: its trainable weights are not those of this student")
        targets: dict[str, torch.Tensor] = {WEIGHTS + name: one.detach() for name, one in trained.items()}
        for name, size in sizes.items():
            if name.startswith(OPTIMIZER):
                parameter = trained[name.removeprefix(OPTIMIZER).split(".", 1)[1]]
                same = size == parameter.shape and ".step." not in f".{name.removeprefix(OPTIMIZER)}"
                targets[name] = torch.zeros_like(parameter) if same else torch.zeros(size)
        return targets
