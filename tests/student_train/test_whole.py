"""Sums find every change of a file, documents every change of themselves; what is published is on the disk first."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.checkpoint import Checkpoints, checkpoint_damage, checkpoints
from student_train.distributed import Processes
from student_train.whole import FILES, damage, files_below, make_folder, read_card, sums, sync_files, write_sealed
from teacher_cache.errors import KdcliError
from teacher_cache.shards.sealed import seal

SHAPE = {"step": int, "identity": dict}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=64), st.data())
def test_any_other_content_is_found(data: bytes, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(data)
        known = sums(folder, files_below(folder))
        assert known["sub/a"][0] == len(data) and damage(folder, known) == ""
        other = draw.draw(st.binary(max_size=64).filter(lambda one: one != data))
        (folder / "sub" / "a").write_bytes(other)
        assert damage(folder, known).startswith("sub/a ")


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_sealed_document_is_itself_or_refused(draw: st.DataObject) -> None:
    """One byte exchanged, or an end cut off: it reads as it was (white space), or as KdcliError of one line; never as another."""
    body = {"step": 3, "identity": {"rate": 1e-3}, "starts": [], FILES: {"a.safetensors": [3, "0" * 64]}}
    data = bytearray(seal(body))
    if draw.draw(st.booleans()):
        data = data[: draw.draw(st.integers(0, len(data) - 1))]
    else:
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "state.json"
        path.write_bytes(data)
        try:
            assert read_card(path, SHAPE) == body
        except KdcliError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("name", ["../a", "/dev/zero", "", "a/../../b", "a\0b"])
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    write_sealed(path, {"step": 1, "identity": {}, FILES: {name: [0, "0" * 64]}})
    with pytest.raises(KdcliError, match="outside of its folder"):
        read_card(path, SHAPE)


@pytest.mark.parametrize("known", [[], {"a": 3}, {"a": [1]}, {"a": ["1", "2"]}, {"a": [True, "0"]}])
def test_sums_of_another_shape(known: Any, tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    write_sealed(path, {"step": 1, "identity": {}, FILES: known})
    with pytest.raises(KdcliError, match="it was not written by kdcli"):
        read_card(path, SHAPE)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is synced and renamed, in order, by its path below ``tmp_path``."""
    seen: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def short(path: Any) -> str:
        return str(path).removeprefix(str(tmp_path)).lstrip("/")

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        seen.append(f"sync {short(os.readlink(f'/proc/self/fd/{number}'))}")
        real["fsync"](handle)

    def moved(name: str) -> Any:
        def move(source: Any, target: Any, **more: Any) -> None:
            seen.append(f"name {short(target)}")
            real[name](source, target, **more)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved("rename"))
    monkeypatch.setattr(os, "replace", moved("replace"))
    return seen


def linear(folder: Path, keep: int = 2) -> Checkpoints:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return Checkpoints(folder, model, optimizer, {"of": 1}, keep, Processes(0, 1, torch.device("cpu")))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, told: list[str]) -> None:
    saved = linear(tmp_path / "new" / "checkpoints")
    saved.save(1)
    saved.wait()
    (named,) = (number for number, one in enumerate(told) if one == "name new/checkpoints/step-0000001")
    draft = "sync new/checkpoints/.draft-0000001"
    before = told[:named]
    synced = [one.removeprefix(draft) for one in before if one.startswith(draft)]
    assert [one for one in synced if one.startswith("/shard-")]
    assert [one for one in synced if one.startswith("/.state.json.draft")]
    assert before[-1] == draft and told[named + 1] == "sync new/checkpoints"
    assert {"sync ", "sync new"} <= set(before), "the folders above, which are new, too"


def test_every_file_of_a_folder_is_synced(tmp_path: Path, told: list[str]) -> None:
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "c").write_text("c")
    told.clear()
    sync_files(tmp_path / "a")
    assert sorted(told) == ["sync a", "sync a/b", "sync a/b/c"]


def test_how_many_stay_and_which_count(tmp_path: Path) -> None:
    """0 keeps all. A damaged one that is set aside does not take a whole one's place."""
    for keep, left in ((0, 4), (2, 2), (1, 1)):
        saved = linear(tmp_path / str(keep), keep)
        for step in range(1, 5):
            saved.save(step)
            saved.wait()
        assert len(checkpoints(tmp_path / str(keep))) == left
    (tmp_path / "2" / "step-0000004" / "state.json").unlink()
    assert checkpoint_damage(tmp_path / "2" / "step-0000004") == "state.json is missing"
    again = linear(tmp_path / "2")
    assert again.load() == 3
    again.save(5)
    again.wait()
    assert [one.name for one in checkpoints(tmp_path / "2")] == ["step-0000003", "step-0000005"]
    state = json.loads((tmp_path / "2" / "step-0000005" / "state.json").read_text())
    assert state["step"] == 5 and set(state[FILES]) == {
        one.name for one in (tmp_path / "2" / "step-0000005").glob("*.safetensors")
    }
