"""``train-student`` with a compressor: two stages, eval of the folder, a run that goes on, processes that draw alike, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.judge.evaluation.run import evaluate_folder
from pipelines.settings import Settings, load_settings
from pipelines.train.train_student import train
from student_train.compressors import CompressorSpec, compressor_modules
from student_train.config import TrainSettings
from student_train.metrics_log import StepResult
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.sources import DataSpec
from tests.warm import Warm

NAMES = sorted(compressor_modules())


@pytest.fixture
def settings_for(tiny_student: Path) -> Callable[..., Settings]:
    """``settings_for(output, compressor, **train settings)``: 2 steps of 4 rows in two micro-batches, a checkpoint every step."""

    def make(output: Path, compressor: str | None, **changes: Any) -> Settings:
        base = TrainSettings(
            student=str(tiny_student),
            output_dir=str(output),
            compressor=compressor,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            save_steps=1,
            report_to="none",
        )
        return Settings(train=replace(base, **changes))

    return make


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_two_stages_and_an_exam(
    tiny_cache: Path, world: Any, settings_for: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    """The second stage starts from the first one's folder; that folder needs no word about its compressor."""
    settings = settings_for(tmp_path / "run", name, vision_tokens=4)
    result = train(str(tiny_cache), "sft", settings, "PT,SFT")
    config = json.loads((Path(result["model"]) / "config.json").read_text())
    assert config["kdcli_compressor"]["name"] == name and config["kdcli_compressor"]["vision_tokens"] == 4
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [one["templates"] for one in card["stages"]] == [{"caption": "plain"}, {"sft": "chat"}]
    assert [stage["compressor"] for stage in card["stages"]] == [config["kdcli_compressor"]] * 2
    first, last = (weights_of(one["model"]) for one in result["stages"])
    assert first.keys() == last.keys()
    moved = {one for one in first if not torch.equal(first[one], last[one])}
    assert any("multi_modal_projector" in one for one in moved) and any("language_model" in one for one in moved)
    scores = evaluate_folder(
        result["model"], DataSpec("heldout", str(world.heldout), image_root=str(world.images)), device="cpu"
    )
    assert scores["n"] == 7
    on = settings_for(tmp_path / "on", None, student=result["model"])
    again = train(str(tiny_cache), "sft", on, "SFT")
    assert (
        json.loads((Path(again["model"]) / "config.json").read_text())["kdcli_compressor"] == config["kdcli_compressor"]
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["tokenpacker", "mqt"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    """Fresh weights and drawn counts are those of the undisturbed run."""
    quiet = train(str(tiny_cache), "sft", settings_for(tmp_path / "quiet", name, max_steps=3), "SFT")
    stopped = settings_for(tmp_path / "stopped", name, max_steps=3)

    def stop(stage: str, step: int, steps: int, result: StepResult) -> None:
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        train(str(tiny_cache), "sft", stopped, "SFT", on_step=stop)
    ended = train(str(tiny_cache), "sft", stopped, "SFT")
    ours, theirs = weights_of(ended["model"]), weights_of(quiet["model"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[one], theirs[one]) for one in ours)


def test_another_compressor_is_another_run(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    train(str(tiny_cache), "sft", settings_for(tmp_path / "run", "adaptive_pool", max_steps=1), "SFT")
    for changes in ({"compressor": "pixel_shuffle"}, {"compressor": "adaptive_pool", "vision_tokens": 4}):
        other = settings_for(tmp_path / "run", changes.pop("compressor"), max_steps=1, **changes)
        with pytest.raises(KdcliError, match=r"holds another finished stage: compressor.*choose another --output-dir"):
            train(str(tiny_cache), "sft", other, "SFT")
    quarter = settings_for(tmp_path / "run", "adaptive_pool", max_steps=1, vision_tokens=9)
    assert train(str(tiny_cache), "sft", quarter, "SFT")["stages"][0]["steps"] == 1, "a quarter, said or not"


def test_every_step_of_mqt_has_its_own_count(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from student_train.compressors.mqt import MQT

    seen: list[int] = []
    forward = MQT.forward

    def watched(self: MQT, features: torch.Tensor) -> torch.Tensor:
        seen.append(self.keep)
        return forward(self, features)

    monkeypatch.setattr(MQT, "forward", watched)
    train(str(tiny_cache), "sft", settings_for(tmp_path / "projector", "mqt", max_steps=1), "PT")
    assert set(seen) == {36}, "the projector's stage learns all queries"
    seen.clear()
    settings = settings_for(tmp_path / "run", "mqt", max_steps=6)
    train(str(tiny_cache), "sft", settings, "SFT")
    seen = seen[2:]  # before them the first micro-batch, twice, to hold logits against the model's own
    assert len(seen) == 12 and seen[::2] == seen[1::2], "micro-batches of a step share its count"
    module = MQT(6, 8, 8, 36, 9)
    assert seen[::2] == [module.draw(0, step) for step in range(6)] and len(set(seen)) > 2


@pytest.mark.parametrize("compressor", ["adaptive_pool", "mqt"])
def test_row_aligned_methods_are_refused_before_the_first_step(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path, compressor: str
) -> None:
    student = Path(shutil.copytree(tiny_student, tmp_path / "no-weights"))
    (student / "model.safetensors").unlink()
    settings = settings_for(tmp_path / "run", compressor, student=str(student))
    with pytest.raises(
        CompatibilityError, match=rf"llava-kd compares .* one by one.*{compressor}.*9 an image.*em-kd"
    ) as caught:
        train(str(tiny_cache), "llava-kd", settings, "DPT")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(CompatibilityError, match=r"choose --vision-tokens from"):
        train(str(tiny_cache), "sft", replace(settings, train=replace(settings.train, vision_tokens=36)), "SFT")


def test_answers_of_the_teacher_train_a_compressed_student(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    result = train(str(tiny_cache), "kd", settings_for(tmp_path / "run", "adaptive_pool"), "DFT")
    assert result["stages"][0]["steps"] == 2


def test_a_method_may_come_with_a_compressor(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from student_train.methods import kd

    monkeypatch.setattr(kd, "COMPRESSOR", "adaptive_pool", raising=False)

    def entry(output: str, compressor: str | None, **changes: Any) -> Any:
        result = train(
            str(tiny_cache), "kd", settings_for(tmp_path / output, compressor, max_steps=1, **changes), "DFT"
        )
        return json.loads((Path(result["model"]) / "config.json").read_text()).get("kdcli_compressor")

    assert entry("own", None) == {"name": "adaptive_pool", "vision_tokens": 9}
    assert entry("none", "none") is None
    assert entry("other", "pixel_shuffle")["name"] == "pixel_shuffle"
    already = str(tmp_path / "other" / "01-DFT" / "model")
    assert entry("already", None, student=already)["name"] == "pixel_shuffle", "the student's own stays"


@pytest.mark.exhaustive  # two processes; the draws alone are tested above
def test_two_processes_draw_the_same_count(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, warm: Warm
) -> None:
    """gloo, mqt: the metrics of one process with twice the micro-batches."""
    one = settings_for(tmp_path / "one", "mqt", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    train(str(tiny_cache), "sft", one, "SFT")
    line = ["train-student", "--method", "sft", "--student", str(one.train.student), "--cache", str(tiny_cache)]
    line += ["--stages", "SFT", "--output-dir", str(tmp_path / "two"), "--max-steps", "2", "--report-to", "none"]
    line += ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2", "--compressor", "mqt"]
    warm.together(2, line, tmp_path)
    ours, theirs = (
        [json.loads(text) for text in (tmp_path / run / "01-SFT" / "metrics.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    for mine, other in zip(ours, theirs, strict=True):
        timeless = {"seconds": 0, "data_seconds": 0}
        assert {**mine, **timeless} == pytest.approx({**other, **timeless}, rel=1e-4)


def test_kd_toml_names_the_compressor(tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_text(
        '[train]\ncompressor = "tokenpacker"\nvision_tokens = 4\nvision_feature_layers = [1, 2]\n'
    )
    train_settings = load_settings(tmp_path / "kd.toml").train
    assert (train_settings.compressor, train_settings.vision_tokens) == ("tokenpacker", 4)
    assert CompressorSpec("tokenpacker", 4, train_settings.vision_feature_layers).layers == (1, 2)
    (tmp_path / "kd.toml").write_text('[train]\nvision_feature_layers = ["a"]\n')
    with pytest.raises(KdcliError, match="vision_feature_layers must be"):
        load_settings(tmp_path / "kd.toml")


@pytest.mark.parametrize("compressor", [None, "mqt"])
def test_matched_methods_train_compressed_students(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, compressor: str | None
) -> None:
    """em-kd brings adaptive_pool along; with mqt, layouts and matchings follow the count of the step."""
    result = train(str(tiny_cache), "em-kd", settings_for(tmp_path / "run", compressor, max_steps=3), "PT,DFT")
    entry = json.loads((Path(result["model"]) / "config.json").read_text())["kdcli_compressor"]
    assert (entry["name"], entry["vision_tokens"]) == (compressor or "adaptive_pool", 9)
    last = json.loads((tmp_path / "run" / "02-DFT" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/vsd"] > 0 and last["loss/vlad"] > 0
