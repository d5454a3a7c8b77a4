"""``train-student`` from end to end: killed and run again, refused with one line, and what it leaves behind."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import StageSettings, TrainSettings
from teacher_cache.errors import CompatibilityError, KdcliError
from tests.warm import Warm, kdcli

STEPS = 6


@pytest.fixture(scope="module")
def dropout_student(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student with attention dropout: its steps depend on random numbers."""
    folder = Path(shutil.copytree(tiny_student, tmp_path_factory.mktemp("dropout") / "student"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def settings_for(tiny_student: Path) -> Callable[..., Settings]:
    """``settings_for(output, **train settings)``: 6 steps of 4 rows a stage, a checkpoint every 2 steps."""

    def make(output: Path, stages: dict[str, StageSettings] | None = None, **changes: Any) -> Settings:
        base = TrainSettings(
            student=str(tiny_student),
            output_dir=str(output),
            per_device_train_batch_size=4,
            max_steps=STEPS,
            save_steps=2,
            report_to="none",
        )
        return Settings(train=replace(base, **changes), stages=stages or {})

    return make


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(ours: Path, theirs: Path) -> bool:
    first, second = weights_of(ours), weights_of(theirs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines without their wall time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


def command(cache: Path, settings: Settings, stages: str, method: str = "llava-kd") -> list[str]:
    """The same run as a command line."""
    s = settings.train
    line = ["train-student", "--method", method, "--student", str(s.student), "--cache", str(cache), "--stages", stages]
    line += ["--output-dir", s.output_dir, "--max-steps", str(s.max_steps), "--save-steps", str(s.save_steps)]
    line += ["--per-device-train-batch-size", str(s.per_device_train_batch_size), "--report-to", s.report_to]
    return [*line, "--gradient-accumulation-steps", str(s.gradient_accumulation_steps)]


def in_threads(threads: int, line: list[str]) -> None:
    torch.set_num_threads(threads)
    kdcli(line)


def test_killed_and_run_again_ends_with_the_same_bits(
    tiny_cache: Path, settings_for: Callable[..., Settings], dropout_student: Path, tmp_path: Path, warm: Warm
) -> None:
    """SIGKILL at a random moment behind a random step of two stages; the rerun's weights and metrics are those of a quiet run."""
    quiet = settings_for(tmp_path / "quiet", student=str(dropout_student))
    train(str(tiny_cache), "llava-kd", quiet, "DPT,DFT")
    killed = settings_for(tmp_path / "killed", student=str(dropout_student))
    stage, at = random.choice(["01-DPT", "02-DFT"]), random.randrange(1, STEPS - 2)
    line = command(tiny_cache, killed, "DPT,DFT")
    process = warm.start(in_threads, torch.get_num_threads(), line, folder=tmp_path)
    log = tmp_path / "killed" / stage / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= at):
        time.sleep(0.005)
    assert process.poll() is None, "the run was to be killed, not to end"
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / stage / "done.json").exists()
    train(str(tiny_cache), "llava-kd", killed, "DPT,DFT")
    for name in ("01-DPT", "02-DFT"):
        assert same_weights(tmp_path / "killed" / name / "model", tmp_path / "quiet" / name / "model"), (stage, at)
        assert metrics(tmp_path / "killed" / name) == metrics(tmp_path / "quiet" / name)
        assert [line["step"] for line in metrics(tmp_path / "killed" / name)] == list(range(STEPS))


class Stop(Exception):
    pass


def stop_after(step: int) -> Callable[..., None]:
    def on_step(stage: str, at: int, steps: int, result: Any) -> None:
        if at == step:
            raise Stop

    return on_step


def interrupted(cache: Path, settings: Settings, step: int, stages: str = "DFT") -> Path:
    """A run that stopped right behind a step. Returns its stage folder."""
    with pytest.raises(Stop):
        train(str(cache), "llava-kd", settings, stages, on_step=stop_after(step))
    return Path(settings.train.output_dir) / f"01-{stages.split(',')[0]}"


def test_a_half_written_checkpoint_is_ignored(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "run")
    folder = interrupted(tiny_cache, settings, 4)
    saved = sorted(one.name for one in (folder / "checkpoints").iterdir())
    assert saved == ["step-0000002", "step-0000004"]
    draft = Path(shutil.copytree(folder / "checkpoints" / saved[-1], folder / "checkpoints" / ".draft-0000006"))
    (draft / "state.json").unlink()
    (draft / "weights.safetensors").write_bytes(b"half")
    (folder / "metrics.jsonl").open("a").write('{"step": 5, "lo')  # a line that the kill cut
    steps: list[int] = []
    train(str(tiny_cache), "llava-kd", settings, "DFT", on_step=lambda stage, step, *_: steps.append(step))
    assert steps == [4, 5]
    assert [line["step"] for line in metrics(folder)] == list(range(STEPS))


CHANGES = {
    "learning_rate": ({"learning_rate": 3e-5}, r"settings\.learning_rate: checkpoint 2e-05, here 3e-05"),
    "batch": ({"per_device_train_batch_size": 2}, r"global_batch: checkpoint 4, here 2"),
    "steps": ({"max_steps": 8}, r"samples: checkpoint 24, here 32"),
    "betas": ({"adam_beta2": 0.95}, r"settings\.adam_beta2: checkpoint 0\.999, here 0\.95"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_settings_is_refused(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, change: str
) -> None:
    settings = settings_for(tmp_path / "run")
    interrupted(tiny_cache, settings, 2)
    changed = replace(settings, train=replace(settings.train, **CHANGES[change][0]))
    with pytest.raises(KdcliError, match=CHANGES[change][1]) as caught:
        train(str(tiny_cache), "llava-kd", changed, "DFT")
    assert "--output-dir" in str(caught.value) and "\n" not in str(caught.value)


def test_resuming_with_other_knobs_or_another_start_is_refused(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path, tiny_student: Path
) -> None:
    settings = settings_for(tmp_path / "run")
    interrupted(tiny_cache, settings, 2)
    with pytest.raises(KdcliError, match=r"knobs\.gamma: checkpoint 0\.5, here 1\.0"):
        train(str(tiny_cache), "llava-kd", settings, "DFT", knobs={"gamma": 1.0})
    other = Path(shutil.copytree(tiny_student, tmp_path / "other"))
    weights = weights_of(other)
    next(value for name, value in weights.items() if "multi_modal_projector" in name).add_(1.0)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    changed = replace(settings, train=replace(settings.train, student=str(other)))
    with pytest.raises(KdcliError, match=r"start: checkpoint"):
        train(str(tiny_cache), "llava-kd", changed, "DFT")


def test_finished_stages_are_skipped_and_their_settings_remembered(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "run", max_steps=2)
    first = train(str(tiny_cache), "llava-kd", settings, "DPT")
    ran: list[str] = []
    again = train(str(tiny_cache), "llava-kd", settings, "DPT,SFT", on_step=lambda stage, *_: ran.append(stage))
    assert set(ran) == {"02-SFT"} and again["stages"][0] == first["stages"][0]
    with pytest.raises(KdcliError, match=r"finished stage.*learning_rate: there 0\.001, here 0\.5"):
        train(str(tiny_cache), "llava-kd", replace(settings, train=replace(settings.train, learning_rate=0.5)), "DPT")
    # Made anew with other settings, the first stage is not the one that the second started from.
    shutil.rmtree(tmp_path / "run" / "01-DPT")
    own = {"DPT": StageSettings(learning_rate=0.5)}
    with pytest.raises(KdcliError, match="02-SFT holds another finished stage: start"):
        train(str(tiny_cache), "llava-kd", replace(settings, stages=own), "DPT,SFT")


def refused(error: type[KdcliError], match: str, run: Callable[[], Any]) -> None:
    """Raises that error, in one line."""
    with pytest.raises(error, match=match) as caught:
        run()
    assert "\n" not in str(caught.value)


def no_model(folder: Path, student: Path) -> Path:
    """The student without its weights: what is refused with it is refused before any model loads."""
    shutil.copytree(student, folder)
    (folder / "model.safetensors").unlink()
    return folder


BEFORE_MODEL: dict[str, tuple[type[KdcliError], str, dict[str, Any]]] = {
    "method": (KdcliError, "unknown method 'llava-dk': choose from .*llava-kd.*, sft", {"method": "llava-dk"}),
    "preset": (KdcliError, "no preset 'papers': choose from default, paper, code", {"preset": "papers"}),
    "knob": (
        KdcliError,
        "no knob gama; it has temperature, temperature_squared, alpha, beta, gamma, reg",
        {"knobs": {"gama": 1.0}},
    ),
    "knob type": (KdcliError, "gamma must be a float, got 'much'", {"knobs": {"gamma": "much"}}),
    "knob value": (KdcliError, "reduction must be mean or sum, got 'max'", {"knobs": {"reduction": "max"}}),
    "pruned layer": (
        KdcliError,
        "compression layer 9 is outside the model, whose layers are 0 to 1",
        {"method": "epic-tcd", "knobs": {"layer": 9}},
    ),
    "stage": (KdcliError, "unknown stage DST: choose from PT, DPT, SFT, DFT", {"stages": "DPT,DST"}),
    "part": (
        KdcliError,
        "stage DFT trains on part talk, and .* has caption, sft: name its parts in kd.toml",
        {"own": {"DFT": StageSettings(parts=("talk",))}},
    ),
}


def test_a_student_that_cannot_be_saved_is_refused_before_its_first_step(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    quantized = no_model(tmp_path / "quantized", tiny_student)
    body = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (quantized / "config.json").write_text(json.dumps(body))

    def run(settings: Settings) -> Any:
        return train(str(tiny_cache), "sft", settings, "SFT")

    whole = settings_for(tmp_path / "a", student=str(quantized))
    refused(CompatibilityError, "its weights are quantized", lambda: run(whole))
    (tmp_path / "b" / "01-SFT").mkdir(parents=True)
    (tmp_path / "b" / "01-SFT" / "model").write_text("")
    refused(KdcliError, "model is a file, and the student goes there", lambda: run(settings_for(tmp_path / "b")))
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("case", BEFORE_MODEL)
def test_refused_before_any_model_loads(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path, case: str
) -> None:
    error, match, changes = BEFORE_MODEL[case]
    settings = settings_for(tmp_path / "run", changes.get("own"), student=str(no_model(tmp_path / "s", tiny_student)))
    given = {"method": "llava-kd", "stages": "DFT"} | {k: v for k, v in changes.items() if k != "own"}
    refused(error, match, lambda: train(str(tiny_cache), settings=settings, **given))
    assert not (tmp_path / "run").exists()


def test_a_kernel_for_gpus_is_refused_before_any_model_loads(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    student = str(no_model(tmp_path / "s", tiny_student))
    settings = settings_for(tmp_path / "run", None, student=student, use_liger_kernel=True)
    refused(KdcliError, "needs a CUDA device", lambda: train(str(tiny_cache), "sft", settings))
    assert not (tmp_path / "run").exists()


def test_a_cache_without_a_needed_field_names_it_and_its_command(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path, copy_of: Any
) -> None:
    cache = copy_of(tiny_cache)
    for name in ("vision_hidden", "vision_topk"):
        shutil.rmtree(cache / "fields" / name)
    settings = settings_for(tmp_path / "run", student=str(no_model(tmp_path / "s", tiny_student)))
    match = "llava-kd needs vision_logits .forward., served by vision_hidden or vision_topk.*cache add-field .* --field vision_hidden"
    refused(CompatibilityError, match, lambda: train(str(cache), "llava-kd", settings, "DFT"))
    # a field that lacks a shard is not there yet
    (next(iter((cache / "fields" / "response_hidden" / "commits").iterdir()))).unlink()
    shutil.rmtree(cache / "fields" / "response_topk")
    match = "llava-kd needs response_logits.*--field response_hidden"
    refused(CompatibilityError, match, lambda: train(str(cache), "llava-kd", settings, "DPT,DFT", knobs={"beta": 0.0}))


def test_another_tokenizer_is_refused_before_any_model_loads(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    student = no_model(tmp_path / "s", tiny_student)
    processor = AutoProcessor.from_pretrained(student)
    processor.tokenizer.add_tokens(["zebrafish"])
    processor.save_pretrained(student)
    settings = settings_for(tmp_path / "run", student=str(student))
    match = r"another tokenizer: only the student's has 'zebrafish' \(id 4160\), which is text to it: give the student"
    refused(CompatibilityError, match, lambda: train(str(tiny_cache), "llava-kd", settings, "DFT"))


def with_side(folder: Path, student: Path, side: int) -> Path:
    """A fresh student of the same kind whose pictures are ``side`` pixels wide."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    processor, config = AutoProcessor.from_pretrained(student), AutoConfig.from_pretrained(student)
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    config.vision_config.image_size = side
    config.image_seq_length = (side // config.vision_config.patch_size) ** 2
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_another_grid_is_refused_where_rows_are_aligned(
    tiny_cache: Path, tiny_student: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "run", student=str(with_side(tmp_path / "s", tiny_student, 64)), max_steps=2)
    match = r"vision grids differ, teacher \[\[\(6, 6\)\]\], student \[\[\(4, 4\)\]\]"
    refused(CompatibilityError, match, lambda: train(str(tiny_cache), "llava-kd", settings, "DPT"))
    assert train(str(tiny_cache), "sft", settings, "SFT")["stages"][0]["steps"] == 2
    answers_only = {"beta": 0.0, "gamma": 0.0}
    elsewhere = replace(settings, train=replace(settings.train, output_dir=str(tmp_path / "answers")))
    assert train(str(tiny_cache), "llava-kd", elsewhere, "DFT", knobs=answers_only)["stages"][0]["steps"] == 2


def test_a_row_that_the_student_cannot_read_is_named(
    tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path / "run", max_length=60)
    match = r"row 0000000\d\d-.* was captured, but the student cannot read it .*over_length.*max_length"
    refused(CompatibilityError, match, lambda: train(str(tiny_cache), "llava-kd", settings, "DFT"))


def test_rows_that_the_capture_cut_are_cut_for_the_student(
    make_request: Callable[..., Any], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    from pipelines.capture.cache_teacher import capture

    fields = ("response_hidden", "vision_hidden")
    capture(make_request(tmp_path / "cache", fields=fields, max_length=80, over_length="cut"))
    settings = settings_for(tmp_path / "run", max_length=80)
    assert train(str(tmp_path / "cache"), "llava-kd", settings, "DFT")["stages"][0]["steps"] == STEPS


def test_temperature_with_top_k_alone_is_refused(
    make_request: Callable[..., Any], settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    from pipelines.capture.cache_teacher import capture

    capture(make_request(tmp_path / "cache", fields=("response_topk", "vision_topk", "relation")))
    settings, said = settings_for(tmp_path / "run", max_steps=1), []
    run = lambda **knobs: train(str(tmp_path / "cache"), "llava-kd", settings, "DFT", knobs=knobs, say=said.append)  # noqa: E731
    refused(CompatibilityError, "valid at temperature 1 only", lambda: run(temperature=2.0))
    assert not (tmp_path / "run").exists(), "refused before anything was loaded or written"
    assert run()["stages"][0]["steps"] == 1
    assert any("vision_logits (forward) served by vision_topk" in note and "lower bound" in note for note in said)


def test_no_step_at_all_is_refused(tiny_cache: Path, settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "run", max_steps=0, num_train_epochs=0.01)
    refused(KdcliError, "give no step", lambda: train(str(tiny_cache), "llava-kd", settings, "DFT"))
