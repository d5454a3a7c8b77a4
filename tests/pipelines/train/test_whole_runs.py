"""Runs of ``train-student`` that find a file altered, cut, gone or added: never trained on in silence, never called finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines.export.run import ExportRequest, export
from pipelines.judge.evaluation.run import evaluate_folder
from pipelines.settings import Settings
from pipelines.train.stage_identity import start_hash
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from student_train.whole import files_below
from teacher_cache.errors import KdcliError
from teacher_cache.sources import DataSpec

STEPS = 4


@pytest.fixture
def settings_for(tiny_student: Path) -> Callable[..., Settings]:
    def make(output: Path, **changes: Any) -> Settings:
        base = TrainSettings(
            student=str(tiny_student),
            output_dir=str(output),
            per_device_train_batch_size=1,
            max_steps=STEPS,
            save_steps=1,
            report_to="none",
        )
        return Settings(train=replace(base, **changes))

    return make


@pytest.fixture(scope="module")
def finished(tiny_cache: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of PT and SFT, 4 steps each; checkpoints of steps 2 and 3 are kept."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    own = {"per_device_train_batch_size": 1, "max_steps": STEPS, "save_steps": 1, "report_to": "none"}
    settings = TrainSettings(student=str(tiny_student), output_dir=str(folder), **own)
    train(str(tiny_cache), "sft", Settings(train=settings), "PT,SFT")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A private copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Again:
    """The same command in a folder: its notes and the steps that it made."""

    def __init__(self, cache: Path, settings: Settings, stages: str = "PT,SFT"):
        self.notes: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self.call = lambda: train(
            str(cache),
            "sft",
            settings,
            stages,
            say=self.notes.append,
            on_step=lambda stage, step, *_: self.steps.append((stage, step)),
        )

    def refused(self, match: str) -> None:
        with pytest.raises(KdcliError, match=match) as caught:
            self.call()
        assert "\n" not in str(caught.value) and not self.steps


@pytest.fixture
def again(tiny_cache: Path, settings_for: Callable[..., Settings], run: Path) -> Again:
    return Again(tiny_cache, settings_for(run))


def flip(file: Path, at: float = 0.7) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}
SAID = {"flipped": "sha256", "cut": "bytes", "empty": "0 bytes", "gone": "missing", "longer": "bytes"}


def interrupted(run: Path) -> None:
    """As a run that was killed behind the checkpoint of step 3 of its second stage."""
    (run / "02-SFT" / "done.json").unlink()
    shutil.rmtree(run / "02-SFT" / "model")


def same_weights(ours: Path, theirs: Path) -> bool:
    mine, other = (load_file(one / "model.safetensors") for one in (ours, theirs))
    return mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)


# ---- checkpoints


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    what: str, again: Again, run: Path, finished: Path
) -> None:
    interrupted(run)
    saved = run / "02-SFT" / "checkpoints"
    (weights,) = (saved / "step-0000003").glob("*.safetensors")
    DAMAGE[what](weights)
    assert again.call()["model"] == str(run / "02-SFT" / "model")
    assert again.steps == [("02-SFT", 2), ("02-SFT", 3)], "from the checkpoint before"
    (note,) = [one for one in again.notes if "damaged" in one]
    assert "step-0000003" in note and SAID[what] in note and "continues from step-0000002" in note
    assert (saved / ".damaged-step-0000003").is_dir()
    assert same_weights(run / "02-SFT" / "model", finished / "02-SFT" / "model")


STATES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "another shape": lambda file: file.write_text('{"step": "three"}'),
    "a list": lambda file: file.write_text("[]"),
    "another rate": lambda file: file.write_text(file.read_text().replace("2e-05", "3e-05")),
    "of another step": lambda file: file.write_bytes((file.parents[1] / "step-0000002" / "state.json").read_bytes()),
    "no text": lambda file: file.write_bytes(b"\xff\xfe"),
    "one sum less": lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "files": {}})),
}


@pytest.mark.parametrize("what", STATES)
def test_a_damaged_state_gives_way_too(what: str, again: Again, run: Path) -> None:
    interrupted(run)
    STATES[what](run / "02-SFT" / "checkpoints" / "step-0000003" / "state.json")
    again.call()
    assert again.steps[0] == ("02-SFT", 2) and any("state.json" in one or "bytes" in one for one in again.notes)


def test_a_file_more_in_a_checkpoint_is_not_read(again: Again, run: Path) -> None:
    interrupted(run)
    newest = run / "02-SFT" / "checkpoints" / "step-0000003"
    (weights,) = newest.glob("*.safetensors")
    shutil.copyfile(weights, newest / "shard-00002-model-00001-of-00001.safetensors")
    again.call()
    assert again.steps[0] == ("02-SFT", 2) and any("does not belong to it" in one for one in again.notes)


def test_no_whole_checkpoint_is_one_line_and_nothing_is_touched(again: Again, run: Path) -> None:
    interrupted(run)
    for weights in (run / "02-SFT" / "checkpoints").rglob("*.safetensors"):
        flip(weights)
    before = files_below(run)
    for _ in range(2):
        again.refused(
            r"step-0000003: damaged .*no other checkpoint is whole: .*remove .*checkpoints to begin the stage again"
        )
    assert files_below(run) == before


def test_a_checkpoint_of_before_without_sums_goes_on_with_a_note(again: Again, run: Path) -> None:
    interrupted(run)
    state = run / "02-SFT" / "checkpoints" / "step-0000003" / "state.json"
    body = json.loads(state.read_text())
    state.write_text(json.dumps({name: body[name] for name in ("step", "identity")}))
    again.call()
    assert again.steps == [("02-SFT", 3)] and any("wrote no sums" in one for one in again.notes)


# ---- finished stages


CHOSEN = [
    *((what, "model.safetensors") for what in DAMAGE),
    ("flipped", "config.json"),
    ("flipped", "tokenizer.json"),
    ("gone", "tokenizer.json"),
]


@pytest.mark.parametrize(("what", "name"), CHOSEN)
def test_a_damaged_final_model_is_made_again(what: str, name: str, again: Again, run: Path, finished: Path) -> None:
    DAMAGE[what](run / "02-SFT" / "model" / name)
    again.call()
    assert again.steps == [("02-SFT", 3)], "from its newest checkpoint, which is whole"
    (note,) = again.notes
    assert name in note and SAID[what] in note
    model = run / "02-SFT" / "model"
    assert files_below(model) == files_below(finished / "02-SFT" / "model")
    assert all(
        (model / one).read_bytes() == (finished / "02-SFT" / "model" / one).read_bytes() for one in files_below(model)
    )


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_final_model_without_checkpoints_is_refused(what: str, again: Again, run: Path) -> None:
    shutil.rmtree(run / "02-SFT" / "model")
    shutil.rmtree(run / "02-SFT" / "checkpoints")
    if what == "empty":
        (run / "02-SFT" / "model").mkdir()
    again.refused(
        r"02-SFT: model/.* is missing, and no checkpoint of the stage is whole: restore .*, or remove .*02-SFT to train"
    )


def test_a_damaged_model_is_not_trained_on(again: Again, run: Path) -> None:
    """The first stage's, with the second one still to come, from a whole checkpoint and without one."""
    shutil.rmtree(run / "02-SFT")
    weights = run / "01-PT" / "model" / "model.safetensors"
    flip(weights)
    shutil.copytree(run, run.with_name("bare"))
    again.call()
    assert again.steps[:2] == [("01-PT", 3), ("02-SFT", 0)] and any("model.safetensors" in one for one in again.notes)
    shutil.rmtree(run)
    run.with_name("bare").rename(run)
    shutil.rmtree(run / "01-PT" / "checkpoints")
    again.steps.clear()
    again.refused("01-PT: model/model.safetensors differs from the written file, by its sha256, and no checkpoint")


def test_a_model_that_nobody_needs_any_more_may_go(again: Again, run: Path) -> None:
    shutil.rmtree(run / "01-PT" / "model")
    assert again.call()["model"] == str(run / "02-SFT" / "model") and not again.steps
    (note,) = again.notes
    assert "01-PT" in note and "02-SFT, which began from it, is finished and stays" in note


def test_a_file_more_in_a_final_model_is_named(again: Again, run: Path) -> None:
    (run / "02-SFT" / "model" / "README.md").write_text("mine")
    again.call()
    (run / "02-SFT" / "model" / "model-00002-of-00002.safetensors").write_bytes(b"")
    again.refused("02-SFT: the stage did not write model/model-00002-of-00002.safetensors.*move that away")


def test_a_damaged_done_names_the_fix_which_works(again: Again, run: Path) -> None:
    done = run / "02-SFT" / "done.json"
    whole = done.read_text()
    for text in (
        "",
        "[]",
        "{}",
        whole[:-30],
        whole.replace("2e-05", "3e-05"),
        whole.replace('"size"', '"sizf"') + " x",
    ):
        done.write_text(text)
        again.refused(r"02-SFT/done\.json: .*remove that file")
    done.unlink()
    again.call()
    assert again.steps == [("02-SFT", 3)] and json.loads(done.read_text())["identity"] == json.loads(whole)["identity"]


def test_a_stage_finished_before_there_were_sums(again: Again, run: Path) -> None:
    done = run / "02-SFT" / "done.json"
    body = json.loads(done.read_text())
    done.write_text(json.dumps({name: body[name] for name in ("identity", "result")}))
    again.call()
    assert not again.steps and any("wrote no sums" in one for one in again.notes)
    DAMAGE["cut"](run / "02-SFT" / "model" / "model.safetensors")
    again.call()
    assert again.steps == [("02-SFT", 3)], "what is cut says so itself"


def test_a_killed_finish_leaves_no_finished_stage(again: Again, run: Path, finished: Path) -> None:
    """Half a model folder beside the checkpoints, its draft too: neither counts."""
    (run / "02-SFT" / "done.json").unlink()
    flip(run / "02-SFT" / "model" / "model.safetensors")
    (run / "02-SFT" / ".model-draft").mkdir()
    (run / "02-SFT" / ".model-draft" / "old.json").write_text("{}")
    again.call()
    assert again.steps == [("02-SFT", 3)] and not (run / "02-SFT" / ".model-draft").exists()
    assert same_weights(run / "02-SFT" / "model", finished / "02-SFT" / "model")


def test_the_start_of_the_next_stage_follows_from_the_sums(run: Path) -> None:
    body = json.loads((run / "01-PT" / "done.json").read_text())
    assert body["weights"] == start_hash(str(run / "01-PT" / "model"))
    assert body["weights"] == json.loads((run / "02-SFT" / "done.json").read_text())["identity"]["start"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_eval_and_export_look_at_the_sums(name: str, run: Path, tmp_path: Path, world: Any) -> None:
    model = run / "02-SFT" / "model"
    flip(model / name)
    spec = DataSpec("heldout", str(world.heldout), image_root=str(world.images))
    for read in (
        lambda: evaluate_folder(str(model), spec),
        lambda: export(ExportRequest(run, tmp_path / "out")),
    ):
        with pytest.raises(
            KdcliError, match=f"02-SFT: model/{name} differs from the written file.*restore it, or run the same"
        ):
            read()
    assert not (tmp_path / "out").exists()
    outside = Path(shutil.copytree(model, tmp_path / "outside"))
    (outside / "tokenizer.json").write_bytes((run / "01-PT" / "model" / "tokenizer.json").read_bytes())
    evaluate_folder(str(outside), replace(spec, limit=1))  # has no sums: nothing is checked


def test_checkpoints_to_keep_are_counted(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(KdcliError, match="save_total_limit must be at least 0, got -1"):
        settings_for(tmp_path, save_total_limit=-1)
