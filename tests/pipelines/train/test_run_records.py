"""What a run's records say: the settings that its weights were trained with, whatever was asked of the folder afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipelines.capture.cache_teacher import capture
from pipelines.export.provenance import read_provenance
from pipelines.export.run import ExportRequest, export
from pipelines.settings import Settings
from pipelines.train import stage_records, stage_run
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from student_train.trainer import Trainer
from student_train.whole import files_below
from teacher_cache.errors import KdcliError


class Asked:
    """A command over ``tiny_cache``, of two steps a stage. Whatever it is given differs from the first one."""

    def __init__(self, cache: Path, student: Path, output: Path):
        self.cache, self.output = cache, output
        own = {"per_device_train_batch_size": 1, "max_steps": 2, "save_steps": 1, "report_to": "none"}
        self.settings = TrainSettings(student=str(student), output_dir=str(output), **own)
        self.notes: list[str] = []

    def __call__(self, stages: str = "PT,SFT", method: str = "sft", cache: Path | None = None, **changes: Any) -> Any:
        own = changes.pop("own", {})
        knobs = changes.pop("knobs", None)
        settings = Settings(train=replace(self.settings, **changes), stages=own)
        return train(str(cache or self.cache), method, settings, stages, knobs=knobs, say=self.notes.append)


@pytest.fixture
def asked(tiny_cache: Path, tiny_student: Path, tmp_path: Path) -> Asked:
    return Asked(tiny_cache, tiny_student, tmp_path / "run")


def rates(card: Any) -> dict[str, float]:
    return {one["folder"]: one["settings"]["learning_rate"] for one in card["stages"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder) if name != ".lock"}


def other_student(student: Path, target: Path) -> Path:
    shutil.copytree(student, target)
    weights = load_file(target / "model.safetensors")
    next(value for name, value in weights.items() if "multi_modal_projector" in name).add_(1.0)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rate": (r"01-PT holds .*learning_rate: there 0\.001, here 0\.5", {"learning_rate": 0.5}),
    "rate of the second": (
        r"02-SFT holds .*learning_rate: there 2e-05, here 0\.5",
        {"own": {"SFT": StageSettings(learning_rate=0.5)}},
    ),
    "seed": (r"01-PT holds .*seed: there 0, here 1", {"seed": 1}),
    "steps": (r"01-PT holds .*samples: there 2, here 3", {"max_steps": 3}),
    "method": (
        r"02-DFT|01-PT|method",
        {"method": "kd", "stages": "PT,DFT", "own": {"PT": StageSettings(learning_rate=0.5)}},
    ),
    "parts": (r"01-PT holds .*parts", {"own": {"PT": StageSettings(parts=("caption", "sft"))}}),
}


@pytest.fixture(scope="module")
def other_cache(make_request: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in other shards."""
    out = tmp_path_factory.mktemp("other") / "cache"
    capture(make_request(out, shards=3, fields=("response_hidden",)))
    return out


@pytest.mark.parametrize("stages", ["PT", "PT,SFT"])
def test_whatever_is_refused_has_written_nothing(
    stages: str, asked: Asked, tiny_student: Path, tmp_path: Path, other_cache: Path
) -> None:
    """Behind the first stage, and behind both: also where the difference is the second stage's, or that of another start or cache."""
    asked(stages)
    before = contents(asked.output)
    cases = {
        **OTHERS,
        "student": (r"01-PT holds .*start: there", {"student": str(other_student(tiny_student, tmp_path / "other"))}),
        "cache": (r"01-PT holds .*plan_hash: there", {"cache": other_cache}),
    }
    for name, (match, changes) in cases.items():
        if stages == "PT" and "second" in name:
            continue
        with pytest.raises(KdcliError, match=match) as caught:
            asked(**changes)
        assert "\n" not in str(caught.value)
        assert contents(asked.output) == before, name


def test_a_stage_that_began_from_another_one_is_refused_before_that_one_trains(asked: Asked) -> None:
    asked()
    asked_again = contents(asked.output)
    with pytest.raises(KdcliError, match=r"02-SFT holds another finished stage: start 01-"):
        asked("SFT,SFT")  # 02-SFT is there, but began from 01-PT
    assert contents(asked.output) == asked_again
    shutil.rmtree(asked.output / "01-PT")
    with pytest.raises(
        KdcliError, match=r"02-SFT holds .*start 01-PT\.settings\.learning_rate: there 0\.001, here 0\.5"
    ):
        asked(own={"PT": StageSettings(learning_rate=0.5)})
    assert not (asked.output / "01-PT").exists()
    asked()  # as it was: trained again with the same bits, and what began from it stays
    assert any((asked.output / "01-PT").iterdir())


def test_an_open_stage_is_looked_at_before_run_json_is_written(asked: Asked) -> None:
    asked()
    (asked.output / "02-SFT" / "done.json").unlink()
    before = contents(asked.output)
    with pytest.raises(
        KdcliError, match=r"02-SFT was made by another run: .*learning_rate: checkpoint 2e-05, here 0\.5"
    ):
        asked(own={"SFT": StageSettings(learning_rate=0.5)})
    assert contents(asked.output) == before


def test_other_stages_keep_their_cards(asked: Asked, tmp_path: Path) -> None:
    """Of another order, of a part of the stages: all that the folder holds stays in ``run.json``, each with its own settings."""
    asked()
    first = json.loads((asked.output / "run.json").read_text())
    asked("SFT", learning_rate=3e-4)
    asked("SFT,PT", learning_rate=3e-4)
    card = json.loads((asked.output / "run.json").read_text())
    assert rates(card) == {"01-PT": 1e-3, "02-SFT": 2e-5, "01-SFT": 3e-4, "02-PT": 3e-4}
    assert [one["folder"] for one in card["stages"]][-2:] == ["01-SFT", "02-PT"], "the newest command's stand last"
    by_folder = {one["folder"]: one for one in card["stages"]}
    assert all(by_folder[one["folder"]] == one for one in first["stages"])
    stages = {name: read_provenance(asked.output / name / "model", None).stages for name in by_folder}
    chains = [[one["folder"] for one in found] for found in stages.values()]
    assert chains == [
        ["01-PT"],
        ["01-PT", "02-SFT"],
        ["01-SFT"],
        ["01-SFT", "02-PT"],
    ]
    assert [one["settings"]["learning_rate"] for one in stages["02-SFT"]] == [1e-3, 2e-5]
    assert stages["02-SFT"][0]["result"]["steps"] == 2
    asked("PT")
    assert rates(json.loads((asked.output / "run.json").read_text())) == rates(card)


def test_the_exported_card_names_what_was_really_used(asked: Asked, tmp_path: Path) -> None:
    """``run.json`` may be anything: changed, lost, damaged, or of stages that were only planned."""
    asked()
    run = asked.output / "run.json"
    body = json.loads(run.read_text())
    body["stages"][1]["settings"]["learning_rate"] = 0.5
    for number, text in enumerate((json.dumps(body), None, "{", "[]", '{"stages": 3}')):
        run.unlink(missing_ok=True)
        if text is not None:
            run.write_text(text)
        out = tmp_path / f"out-{number}"
        export(ExportRequest(asked.output / "02-SFT", out))
        card = (out / "README.md").read_text()
        assert "learning rate 0.001" in card and "learning rate 2e-05" in card and "0.5" not in card
    asked()
    assert rates(json.loads(run.read_text())) == {"01-PT": 1e-3, "02-SFT": 2e-5}
    assert any("run.json is damaged and is written again" in one for one in asked.notes)


def test_a_kill_between_run_json_and_training(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained then, so other settings may follow; the plan of before leaves no card."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage_run, "load_student", killed)
        with pytest.raises(Killed):
            asked("PT,DFT", "kd", learning_rate=0.5)
    assert rates(json.loads((asked.output / "run.json").read_text())) == {"01-PT": 0.5, "02-DFT": 0.5}
    asked()
    assert rates(json.loads((asked.output / "run.json").read_text())) == {"01-PT": 1e-3, "02-SFT": 2e-5}


def test_settings_that_may_change_are_kept_by_the_step(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """``save_steps`` is no part of a stage's identity: the record has both, and from which step on."""

    class Killed(BaseException):
        pass

    real, made = Trainer.step, []

    def step(self: Trainer, number: int, batches: Any) -> Any:
        made.append(number)
        if number == 1:
            raise Killed
        return real(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Killed):
            asked("PT")
    asked("PT", save_steps=7)
    starts = json.loads((asked.output / "01-PT" / "done.json").read_text())["starts"]
    assert [(one["step"], one["card"]["settings"]["save_steps"]) for one in starts] == [(0, 1), (1, 7)]


def test_run_json_is_whole_or_the_one_before(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("PT")
    before = (asked.output / "run.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("student_train.whole.os.fsync", full)
    with pytest.raises(KdcliError, match="No space left on device"):
        asked("PT,SFT")
    assert (asked.output / "run.json").read_bytes() == before
    assert not [one for one in files_below(asked.output) if one.startswith(".run")]


def test_records_of_versions_before(asked: Asked, tmp_path: Path) -> None:
    """A run without records of its own is known by its ``run.json``, whose stages have no folders."""
    asked()
    for name in ("01-PT", "02-SFT"):
        done = asked.output / name / "done.json"
        body = json.loads(done.read_text())
        done.write_text(json.dumps({key: body[key] for key in ("identity", "result")}))
    run = asked.output / "run.json"
    body = json.loads(run.read_text())
    for one in body["stages"]:
        for key in ("folder", "cache", "plan_hash", "versions", "git"):
            del one[key]
    run.write_text(json.dumps(body))
    shutil.rmtree(asked.output / "01-PT" / "checkpoints")
    shutil.rmtree(asked.output / "02-SFT" / "checkpoints")
    origin = read_provenance(asked.output / "02-SFT" / "model", None)
    assert [one["settings"]["learning_rate"] for one in origin.stages] == [1e-3, 2e-5]
    asked("SFT")
    assert set(rates(json.loads(run.read_text()))) == {"01-PT", "02-SFT", "01-SFT"}
    assert stage_records.STAGE_FOLDER.fullmatch("01-PT")
