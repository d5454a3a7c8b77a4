"""A capture as a Slurm array: one job that prepares, then an array whose tasks each make the shards that fall to their number.

Every task is the ordinary ``kdcli cache-teacher`` with ``--part-of-shards``; Slurm only schedules. A task that was killed or requeued
goes on from what is committed, and a second submission of the same array does what is left.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import KdcliError
from teacher_cache.whole_file import write_whole

PREPARE, SHARDS = "prepare.sbatch", "shards.sbatch"


@dataclass(frozen=True)
class SlurmJob:
    """An array to be submitted.

    Attributes:
        command: program and arguments of the capture, without what says how it is scheduled.
        tasks: of the array. options: of ``sbatch``, for both jobs, e.g. ``--partition=gpu --gres=gpu:1``.
        folder: where scripts and logs go. workdir: where the tasks run, so that relative paths mean what they mean here.
    """

    command: Sequence[str]
    tasks: int
    options: Sequence[str]
    folder: Path
    workdir: Path

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise KdcliError(f"--slurm-tasks must be at least 1, got {self.tasks}")
        for option in self.options:
            if not option.startswith("-"):
                raise KdcliError(f"--slurm-options: write options as --name=value, got {option!r}")

    def scripts(self) -> dict[str, str]:
        """File name → text."""
        shards = [*self.command, "--executor", "local"]
        # The count stands in the script: a later `sbatch --array=3,7` must not change what a number means.
        part = f'--part-of-shards "$SLURM_ARRAY_TASK_ID/{self.tasks}"'
        return {
            PREPARE: self._script("kdcli-prepare", "prepare-%j.log", [], [*shards, "--prepare-only"], ""),
            SHARDS: self._script("kdcli-shards", "shards-%A-%a.log", [f"--array=0-{self.tasks - 1}"], shards, part),
        }

    def _script(self, name: str, log: str, more: Sequence[str], command: Sequence[str], last: str) -> str:
        options = [f"--job-name={name}", f"--output={self.folder}/{log}", "--requeue", *more, *self.options]
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail"]
        lines += [f"cd {shlex.quote(str(self.workdir))}", f"exec {shlex.join(command)} {last}".rstrip()]
        return "\n".join(lines) + "\n"

    def plan(self) -> str:
        """Both scripts and how they are submitted, for a person."""
        texts = [f"# {self.folder / name}\n{text}" for name, text in self.scripts().items()]
        lines = [f"prepare=$(sbatch --parsable {self.folder / PREPARE})"]
        lines += [f"sbatch --dependency=afterok:$prepare {self.folder / SHARDS}"]
        return "\n".join([*texts, "# then", *lines])

    def submit(self) -> tuple[str, str]:
        """(id of the preparing job, of the array); KdcliError where Slurm refuses them."""
        for name, text in self.scripts().items():
            write_whole(self.folder / name, text)
        first = self._sbatch(self.folder / PREPARE)
        return first, self._sbatch(f"--dependency=afterok:{first}", self.folder / SHARDS)

    def _sbatch(self, *arguments: str | Path) -> str:
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", *map(str, arguments)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise KdcliError(
                "sbatch is not on this machine: run where Slurm's commands are, or --dry-run prints the scripts"
            ) from None
        if done.returncode:
            raise KdcliError(f"sbatch refuses {arguments[-1]}: {' '.join(done.stderr.split()) or 'no reason given'}")
        return done.stdout.strip().split(";")[0]  # with a cluster's name behind the id, where there are several
