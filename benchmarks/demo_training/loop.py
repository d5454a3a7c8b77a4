"""A small training loop for two CPU cores: bf16 arithmetic, fp32 masters, cosine by progress, resumable checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.demo_training.recipe import StudentRecipe, TeacherRecipe

Loss = Callable[[dict], tuple[torch.Tensor, dict[str, float]]]


@dataclass
class Group:
    """Modules that learn at the same rate (relative to the phase's)."""

    modules: nn.Module
    ratio: float = 1.0


class Masters:
    """fp32 copies of bf16 parameters and the AdamW that moves them (bf16 alone would round small steps away)."""

    def __init__(self, groups: list[Group], learning_rate: float, recipe: TeacherRecipe | StudentRecipe):
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.clip = recipe.clip
        self.learning_rate = learning_rate
        seen: set[int] = set()
        optimizer_groups = []
        for group in groups:
            decayed: list[nn.Parameter] = []
            plain: list[nn.Parameter] = []
            for parameter in group.modules.parameters():
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                master = nn.Parameter(parameter.detach().float().clone())
                self.pairs.append((parameter, master))
                (decayed if parameter.ndim > 1 else plain).append(master)
            for members, decay in ((decayed, recipe.weight_decay), (plain, 0.0)):
                optimizer_groups.append({"params": members, "weight_decay": decay, "ratio": group.ratio})
            group.modules.bfloat16()
        self.optimizer = torch.optim.AdamW(optimizer_groups, lr=learning_rate, betas=recipe.betas, fused=True)

    def step(self, factor: float) -> float:
        """One AdamW step at ``factor`` of the peak rate; returns the gradient norm before clipping."""
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_([m for _, m in self.pairs], self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor * group["ratio"]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
        return float(norm)

    def restore_fp32(self, *modules: nn.Module) -> None:
        """Turns modules back into fp32 with the masters' exact values."""
        for module in modules:
            module.float()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)

    def state(self) -> dict:
        return {"masters": [m.detach() for _, m in self.pairs], "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for (parameter, master), saved in zip(self.pairs, state["masters"]):
                master.copy_(saved)
                parameter.copy_(saved)


@dataclass
class Phase:
    """One training phase. The budget is in steps, or in minutes where ``minutes`` is given."""

    name: str
    steps: int
    minutes: float | None
    folder: Path  # checkpoints and log
    recipe: TeacherRecipe | StudentRecipe
    watch: Callable[[], dict[str, float]] | None = None  # accuracies to log now and then
    watch_every: float = 240.0  # seconds
    save_every: float = 300.0  # seconds

    def run(self, masters: Masters, loss_of: Loss, batches: Callable[[int], Iterator[dict]], resume: bool) -> int:
        """Trains until the budget is spent; returns the number of steps done."""
        step, elapsed = self._restore(masters) if resume else (0, 0.0)
        stream = batches(step)
        started = time.monotonic() - elapsed
        logged = saved = watched = time.monotonic()
        while (progress := self._progress(step, time.monotonic() - started)) < 1:
            loss, parts = loss_of(next(stream))
            loss.backward()
            norm = masters.step(self._factor(progress))
            step += 1
            now = time.monotonic()
            if now - logged > 15:
                self.log({"step": step, "minutes": (now - started) / 60, "loss": loss.item(), "norm": norm, **parts})
                logged = now
            if self.watch is not None and now - watched > self.watch_every:
                self.log({"step": step, "minutes": (now - started) / 60, "accuracy": self.watch()})
                watched = time.monotonic()
            if now - saved > self.save_every:
                self._save(masters, step, now - started)
                saved = now
        self._save(masters, step, time.monotonic() - started)
        return step

    def log(self, row: dict) -> None:
        line = json.dumps({"phase": self.name, **_rounded(row)})
        print(line, flush=True)
        with open(self.folder / "training_log.jsonl", "a") as out:
            out.write(line + "\n")

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def _progress(self, step: int, seconds: float) -> float:
        return step / self.steps if self.minutes is None else seconds / (60 * self.minutes)

    def _factor(self, progress: float) -> float:
        """Linear warm-up, then a cosine down to the floor."""
        recipe = self.recipe
        if progress < recipe.warmup:
            return max(progress, 1e-4) / recipe.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))
        return recipe.floor + (1 - recipe.floor) * cosine

    def _save(self, masters: Masters, step: int, elapsed: float) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"step": step, "elapsed": elapsed, **masters.state()}, partial)
        partial.replace(self.checkpoint)  # a killed run leaves the previous checkpoint whole

    def _restore(self, masters: Masters) -> tuple[int, float]:
        if not self.checkpoint.exists():
            return 0, 0.0
        state = torch.load(self.checkpoint, weights_only=True)
        masters.load(state)
        return state["step"], state["elapsed"]


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
