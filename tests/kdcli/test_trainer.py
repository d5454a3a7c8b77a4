"""``DistillTrainer``: every method's gradients are train-student's, a run resumes exactly, evaluation is the model's own loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcli
from teacher_cache.errors import KdcliError
from tests.kdcli.conftest import Gradients, as_in_stage_dft, far, gradients_of

pytest.importorskip("accelerate")
from transformers import TrainerCallback, TrainingArguments

CLOSE = 2e-5
"""Share of the gradient's norm: float32 sums in another order."""


class Kept(TrainerCallback):
    """The gradients of every step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        self.steps.append(gradients_of(self.trainer.step_loss.module))


@pytest.fixture(scope="module")
def attention_cache(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """What Align-KD reads, of the same rows."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "attention"
    capture(make_request(out, fields=("response_topk", "attention", "vision_features")))
    return out


@pytest.fixture
def make(tiny_cache: Path, student: Any, processor: Any, tmp_path: Path) -> Callable[..., Any]:
    """``make(method, model=None, …TrainingArguments)`` → (trainer, kept gradients); 3 steps of 4 rows, part sft."""

    def one(
        method: str,
        model: Any = None,
        knobs: Mapping[str, Any] | None = None,
        parts: Any = ("sft",),
        cache: str = str(tiny_cache),
        **settings: Any,
    ) -> Any:
        given = {
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "seed": 0,
            "report_to": "none",
            "save_strategy": "no",
        }
        kept = Kept()
        trainer = kdcli.DistillTrainer(
            student if model is None else model,
            TrainingArguments(str(tmp_path / "hf"), disable_tqdm=True, use_cpu=True, **{**given, **settings}),
            cache=cache,
            parts=parts,
            method=method,
            knobs=knobs,
            processing_class=processor,
            callbacks=[kept],
        )
        kept.trainer = trainer
        return trainer, kept

    return one


CUT = ("--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2")


@pytest.mark.parametrize("method", ["sft", "kd", "llava-kd", "em-kd", "align-kd", "llavadi"])
def test_the_gradients_of_every_kind_of_method(
    method: str, make: Callable[..., Any], train_student: Callable[..., list[Gradients]], attention_cache: Path
) -> None:
    """Of three steps on untouched weights, each in two batches; learned maps included."""
    cache = {"cache": str(attention_cache)} if method == "align-kd" else {}
    told = ("--cache", str(attention_cache)) if method == "align-kd" else ()
    knobs = {"temperature": 2.0} if method == "kd" else {}
    told += ("--set", "temperature=2.0") if method == "kd" else ()
    told += ("--compressor", "none") if method == "em-kd" else ()
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, kept = make(method, knobs=knobs, learning_rate=0.0, **cut, **cache)
    trainer.train()
    expected = train_student("--method", method, *CUT, *told)
    assert len(kept.steps) == len(expected) == 3
    for ours, theirs in zip(kept.steps, expected):
        assert far(ours, theirs) < CLOSE


def test_terms_are_logged_as_train_student_logs_them(
    make: Callable[..., Any], train_student: Callable[..., list[Gradients]], here: Path
) -> None:
    trainer, _ = make("llava-kd", learning_rate=0.0, logging_steps=1)
    trainer.train()
    train_student("--method", "llava-kd", "--per-device-train-batch-size", "4")
    theirs = [json.loads(line) for line in (here / "run" / "01-DFT" / "metrics.jsonl").read_text().splitlines()]
    ours = [one for one in trainer.state.log_history if "loss" in one]
    names = [name for name in theirs[0] if name.startswith("loss")]
    assert len(names) > 3 and len(ours) == len(theirs) == 3
    for mine, line in zip(ours, theirs):
        assert {name: mine[name] for name in names} == pytest.approx({name: line[name] for name in names}, rel=1e-4)


def test_in_bf16(make: Callable[..., Any], train_student: Callable[..., list[Gradients]]) -> None:
    """With recomputed activations, which change nothing."""
    trainer, kept = make("llava-kd", learning_rate=0.0, bf16=True, gradient_checkpointing=True)
    trainer.train()
    told = ("--method", "llava-kd", "--per-device-train-batch-size", "4", "--bf16", "--no-packing")
    for ours, theirs in zip(kept.steps, train_student(*told), strict=True):
        assert far(ours, theirs) < CLOSE


def test_a_compressed_student(
    make: Callable[..., Any], train_student: Callable[..., list[Gradients]], tiny_student: Path
) -> None:
    """EM-KD's own compressor is part of the student that is given: 9 of its vision tokens matched with the teacher's 36."""
    from student_train.compressors import CompressorSpec
    from student_train.load_student import load_student

    model, _ = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec("adaptive_pool"))
    model.model.vision_tower.requires_grad_(False)
    trainer, kept = make("em-kd", model=model, learning_rate=0.0)
    trainer.train()
    told = ("--method", "em-kd", "--per-device-train-batch-size", "4")
    for ours, theirs in zip(kept.steps, train_student(*told), strict=True):
        assert far(ours, theirs) < CLOSE


def test_a_method_of_passes(
    make: Callable[..., Any], train_student: Callable[..., list[Gradients]], deep_student: Path
) -> None:
    """EPIC: what is removed is drawn anew in every step and batch."""
    model = as_in_stage_dft(deep_student)
    trainer, kept = make("epic-tcd", model=model, learning_rate=0.0)
    trainer.train()
    told = ("--method", "epic-tcd", "--student", str(deep_student), "--per-device-train-batch-size", "4")
    for ours, theirs in zip(kept.steps, train_student(*told), strict=True):
        assert far(ours, theirs) < CLOSE


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_undisturbed_one(workers: int, make: Callable[..., Any], tmp_path: Path) -> None:
    """Behind an epoch's border, with a method that has learned maps."""
    steps = {"max_steps": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "dataloader_num_workers": workers}
    steps |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 7}
    trainer, _ = make("llavadi", **steps)
    trainer.model.save_pretrained(tmp_path / "start")
    trainer.train()
    whole = {name: one.detach().clone() for name, one in trainer.step_loss.module.named_parameters()}
    assert any(name.startswith("maps.") for name in whole)
    checkpoint = tmp_path / "hf" / "checkpoint-7"
    assert (checkpoint / "maps.safetensors").is_file()
    again, kept = make("llavadi", model=as_in_stage_dft(tmp_path / "start"), **steps)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert len(kept.steps) == 1
    for name, one in again.step_loss.module.named_parameters():
        assert torch.equal(one, whole[name]), name


def test_one_epoch_is_every_row_once(make: Callable[..., Any]) -> None:
    """With the short last step of train-student; with two epochs the rows go on where the first ends."""
    trainer, _ = make("sft", max_steps=-1, num_train_epochs=1, parts=None)
    keys = [key for batch in trainer.get_train_dataloader() for key in batch["teacher"].keys]
    assert len(keys) == 31 == len(set(keys))
    trainer, _ = make("sft", max_steps=-1, num_train_epochs=2, parts=None)
    loader, found = trainer.get_train_dataloader(), []
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        found += [batch["teacher"].keys for batch in loader]
    stream = trainer.rows.stream(4, seed=trainer.args.seed, epochs=64 / 31)
    assert found == [tuple(row.prepared.key for row in stream.at(number)) for number in range(16)]


def test_evaluation_is_the_models_own_loss(make: Callable[..., Any], processor: Any, tiny_cache: Path) -> None:
    trainer, _ = make("llava-kd", per_device_eval_batch_size=21)
    held = kdcli.open_cache(str(tiny_cache)).dataset(
        ["sft"], needs=[], processor=processor, config=trainer.model.config
    )
    loss = trainer.evaluate(held)["eval_loss"]
    batch = kdcli.Collator(held)([held[number] for number in range(21)])
    del batch["teacher"]
    trainer.model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(float(trainer.model(**batch).loss), rel=1e-5)


def test_what_it_cannot_do_is_refused(make: Callable[..., Any], student: Any, processor: Any, tiny_cache: Path) -> None:
    with pytest.raises(KdcliError, match="take bf16"):
        make("kd", fp16=True)
    given: dict[str, Any] = {"processor": processor, "config": student.config}
    cache = kdcli.open_cache(str(tiny_cache))
    for wrong, said in [
        ({}, "give train_dataset="),
        ({"cache": cache, "method": "kd", "train_dataset": cache.dataset(method="kd", **given)}, "give train_dataset="),
        ({"train_dataset": cache.dataset(needs=[], **given)}, "was made for needs"),
        ({"cache": cache, "method": "kd", "compute_loss_func": print}, "compute_loss_func cannot be given"),
    ]:
        with pytest.raises(KdcliError, match=said):
            kdcli.DistillTrainer(student, **wrong)


def test_a_dataset_may_be_given(make: Callable[..., Any], student: Any, processor: Any, tmp_path: Path) -> None:
    """With what only a dataset takes."""
    trainer, kept = make("llava-kd", learning_rate=0.0)
    trainer.train()
    cache = kdcli.open_cache(trainer.rows.cache.storage.url)
    rows = cache.dataset(["sft"], method="llava-kd", processor=processor, config=student.config, max_length=4000)
    arguments = TrainingArguments(
        str(tmp_path / "other"), per_device_train_batch_size=4, max_steps=3, learning_rate=0.0, report_to="none", seed=0,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    again = Kept()
    other = kdcli.DistillTrainer(student, arguments, train_dataset=rows, callbacks=[again])
    again.trainer = other
    other.train()
    for ours, theirs in zip(again.steps, kept.steps, strict=True):
        assert far(ours, theirs) < CLOSE


TWO = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainingArguments
import kdcli
from tests.kdcli.conftest import gradients_of

cache, model, out = sys.argv[1:]
student = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
student.model.vision_tower.requires_grad_(False)
arguments = TrainingArguments(out, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3, seed=0, learning_rate=0.0,
    report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)

class Kept(TrainerCallback):
    def on_pre_optimizer_step(self, arguments, state, control, **rest):
        if state.global_step == 1 and arguments.process_index == 0:
            torch.save(gradients_of(trainer.step_loss.module), f"{out}.pt")

trainer = kdcli.DistillTrainer(student, arguments, cache=cache, parts=["sft"], method="llava-kd",
    processing_class=AutoProcessor.from_pretrained(model), callbacks=[Kept()])
trainer.train()
"""


@pytest.mark.exhaustive  # two processes of torchrun; tests/pipelines/processes/test_processes.py has the trainer's own
def test_two_processes_have_the_gradients_of_one(
    tiny_cache: Path, tiny_student: Path, tmp_path: Path, train_student: Callable[..., list[Gradients]]
) -> None:
    program, out = tmp_path / "two.py", tmp_path / "out"
    program.write_text(TWO)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(
        [*words, str(tiny_cache), str(tiny_student), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert far(torch.load(f"{out}.pt"), train_student("--method", "llava-kd", *CUT)[1]) < CLOSE
