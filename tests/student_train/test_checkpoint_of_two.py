"""Two real processes (gloo) write one checkpoint, and end together where the first one refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from student_train import distributed
from student_train.checkpoint import Checkpoints
from student_train.whole import read_card
from teacher_cache.errors import KdcliError
from tests.warm import Warm


def two(folder: Path) -> None:
    """What each of them does."""
    processes = distributed.start()
    assert processes.told({"rank": processes.rank, "word": "ü" * processes.rank}) == [
        {"rank": 0, "word": ""},
        {"rank": 1, "word": "ü"},
    ]
    assert processes.main_alone(lambda: 7) == (7 if processes.is_main else None)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    notes = []

    def saved():
        return Checkpoints(folder, model, optimizer, {"of": "this"}, 2, processes, {"rate": 1}, [], notes.append)

    one = saved()
    assert one.load() == 0
    for step in (1, 2):
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        one.save(step)
        one.wait()
    processes.barrier()
    if processes.is_main:
        state = read_card(folder / "step-0000002" / "state.json", {"step": int, "identity": dict})
        assert {name[:11] for name in state["files"]} == {"shard-00001", "shard-00002"}, state["files"]
        (other,) = (folder / "step-0000002").glob("shard-00002-*")  # what the second process wrote
        data = bytearray(other.read_bytes())
        data[-1] ^= 1
        other.write_bytes(data)
    processes.barrier()
    again = saved()
    assert again.load() == 1 and again.starts == [{"step": 0, "card": {"rate": 1}}]
    assert len(notes) == (1 if processes.is_main else 0), notes

    def refuse():
        raise KdcliError("the first one refuses")

    try:
        processes.main_alone(refuse)
    except KdcliError as error:
        print(f"{processes.rank}: {error}", file=sys.stderr, flush=True)
    except SystemExit as error:
        print(f"{processes.rank}: exit {error.code}", file=sys.stderr, flush=True)
    processes.barrier()
    distributed.stop()


def test_sums_of_every_process_and_one_refusal_for_all(tmp_path: Path, warm: Warm) -> None:
    both = warm.ranks(2, two, tmp_path / "run", tmp_path)
    assert [one.wait() for one in both] == [0, 0], both[0].said()
    assert "0: the first one refuses" in both[0].said() and "1: exit 1" in both[1].said()
    state = json.loads((tmp_path / "run" / "step-0000001" / "state.json").read_text())
    assert state["starts"] == [{"step": 0, "card": {"rate": 1}}] and state["before"] == []
