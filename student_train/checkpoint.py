"""Checkpoints: a folder a step, renamed into place when complete, so that a kill never leaves half of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from teacher_cache.errors import KdcliError
from teacher_cache.shards.schema import COUNT, misfit


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], keep: int
) -> None:
    """Trainable weights, optimizer state and step under ``folder/step-N``; older ones beyond ``keep`` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    draft, target = folder / f".draft-{step:07d}", folder / f"step-{step:07d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, draft / "weights.safetensors")
    save_file(_flatten(optimizer), draft / "optimizer.safetensors")
    (draft / "state.json").write_text(json.dumps({"step": step, "identity": identity}, indent=1, sort_keys=True))
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> int:
    """Restore everything and return the step to continue with; KdcliError where it is of another run."""
    state = read_card(path / "state.json", {"step": COUNT, "identity": dict})
    if state["identity"] != identity:
        from teacher_cache.plan import difference

        lines = "; ".join(difference(state["identity"], identity)).replace("cache ", "checkpoint ")
        raise KdcliError(f"{path} was made by another run: {lines}: choose another --output-dir, or remove the folder")
    weights = read_tensors(path / "weights.safetensors")
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in own.items()} != {name: one.shape for name, one in weights.items()}:
        raise KdcliError(f"{path}: its trainable weights are not those of this student")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    try:
        _unflatten(optimizer, read_tensors(path / "optimizer.safetensors"))
    except (ValueError, KeyError, TypeError) as error:
        raise KdcliError(f"{path}: its optimizer state is not of this student ({error}): remove the folder") from None
    return int(state["step"])


def read_card(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """A JSON document that a run left beside its files; KdcliError naming it where it is damaged or of another shape."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise KdcliError(f"{path}: damaged ({error}): remove its folder to do that part again") from None
    if wrong := misfit(body, shape):
        raise KdcliError(f"{path}: {wrong}: it was not written by kdcli; remove its folder to do that part again")
    return body


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """KdcliError naming the file where it is no safetensors file; nothing else is ever read as tensors."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise KdcliError(f"{path}: cannot be read ({error}): remove its folder to do that part again") from None


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Per-parameter state as named tensors; hyper-parameters are recomputed from the settings, never restored."""
    states = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone().contiguous()
        for number, state in states.items()
        for name, value in state.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, stored: dict[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in stored.items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
