"""What do sums and syncing cost when a run's files are written? Of the demo's student, or of ``--model FOLDER``.

    python -m benchmarks.checkpoint_sums [--model FOLDER] [--repeats 9]

A checkpoint (weights and AdamW's state, behind which training goes on) and a finished stage's model, each written as ``train-student``
does. Columns: MB, seconds in all, and the shares of that which go into sha256 and into what is synced besides the tensors of a checkpoint,
which torch's own writer syncs. Shares are medians of ratios inside a repeat; the folder is ``--out``, a temporary one without it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import argument_parser, finish, machine, median_ratio, print_table, spread
from student_train.checkpoint import Checkpoints
from student_train.distributed import Processes
from student_train.load_student import load_student, save_student
from student_train.whole import files_below, sums, sync_files, write_sealed


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def checkpoint(model: torch.nn.Module, folder: Path) -> tuple[Callable[[], None], Path]:
    """(writes one checkpoint and waits for it, where it lies), every parameter trained."""
    optimizer = torch.optim.AdamW(model.parameters())
    for one in model.parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    saved = Checkpoints(folder, model, optimizer, {}, 1, Processes(0, 1, torch.device("cpu")))

    def write() -> None:
        saved.save(1)
        saved.wait()

    return write, folder / "step-0000001"


def added(folder: Path, sync: Callable[[Path], None]) -> tuple[float, float]:
    """(seconds of sums, seconds of syncing) of what lies there, again."""
    names = files_below(folder)
    known: dict[str, Any] = {}
    hashed = seconds(lambda: known.update(sums(folder, names)))
    card = folder.parent / "card.json"
    return hashed, seconds(lambda: (sync(folder), write_sealed(card, {"files": known})))


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, processor = load_student(str(options.model or Path(options.models) / "student_start"), "sdpa")
    with tempfile.TemporaryDirectory(dir=options.out) as place:
        folder = Path(place)
        write, there = checkpoint(model, folder)
        target = folder / "model"

        def save() -> None:
            shutil.rmtree(target, ignore_errors=True)
            save_student(model, processor, target)
            sync_files(target)
            write_sealed(folder / "done.json", {"files": sums(target, files_below(target))})

        kinds = {"checkpoint": (write, there, lambda path: None), "model": (save, target, sync_files)}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
        for _ in range(options.repeats):
            for name, (run, path, sync) in kinds.items():
                found[name].append((seconds(run), *added(path, sync)))
        size = {
            name: sum((path / one).stat().st_size for one in files_below(path)) for name, (_, path, _) in kinds.items()
        }
    results = []
    for name, lines in found.items():
        whole, hashed, synced = ([line[i] for line in lines] for i in range(3))
        results.append(
            {
                "what": name,
                "megabytes": round(size[name] / 1e6, 1),
                "seconds": spread(whole),
                "share_of_sums": round(median_ratio(hashed, whole), 4),
                "share_of_syncing": round(median_ratio(synced, whole), 4),
            }
        )
    header = ["what", "MB", "seconds", "sha256", "syncing"]
    rows = [
        [
            one["what"],
            one["megabytes"],
            f"{one['seconds'][1]:.3f}",
            f"{one['share_of_sums']:.1%}",
            f"{one['share_of_syncing']:.1%}",
        ]
        for one in results
    ]
    print_table(header, rows)
    body = {"machine": machine(options.device), "shapes": options.shapes, "results": json.loads(json.dumps(results))}
    finish("checkpoint_sums", body, options.save)


if __name__ == "__main__":
    main()
