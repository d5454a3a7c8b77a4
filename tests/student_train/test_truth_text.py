"""Losses of students that read text alone, from the cache by the product's own path, against the live teacher in float64.

The reference has no part of the product: the tokenizer's own ``apply_chat_template``, answers found by their marks, both whole models row
by row without padding, the papers' formulas over full probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.text_student import write_student
from tests.close import assert_all_close
from tests.student_train.test_truth_baselines import CASES
from tests.text_models import build_text_folder, write_rows

ROWS = 14
LAST = ("kd", "minillm", "skew", "jsd", "kd, T=2")
PAIRS = {
    "fewer layers, tied": ("llama", True),
    "fewer layers, two heads": ("qwen2", False),
    "gpt2": ("gpt2", True),
}
"""Teacher of three layers and its student of two. Heads have padding rows beyond the tokenizer."""


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """(teacher, student, rows, cache of fp32 hidden states)"""
    from pipelines.capture.cache_teacher import capture
    from pipelines.capture.worker import CaptureRequest
    from pipelines.settings import CaptureSettings
    from teacher_cache.sources import DataSpec
    from teacher_cache.teachers.transformers import TeacherSpec

    kind, tied = PAIRS[request.param]
    folder = tmp_path_factory.mktemp(kind)
    teacher = build_text_folder(folder / "teacher", kind, width=48, layers=3, tied=tied)
    student = write_student(teacher, folder / "student", 2)
    rows = write_rows(folder / "rows.jsonl", ROWS)
    capture(
        CaptureRequest(
            TeacherSpec(str(teacher), dtype="float32", device="cpu"),
            (DataSpec("sft", str(rows)),),
            str(folder / "cache"),
            CaptureSettings(shards=2, fields=("response_hidden",), workers=1, batch_tokens=128),
            {"response_hidden": {"codec": "fp32"}},
        )
    )
    return teacher, student, rows, folder / "cache"


def answers(model: Any, tokenizer: Any, rows: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float64 ``[R, V]`` of the tokens that predict an answer's, those tokens), row after row."""
    begin, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    logits, labels = [], []
    for line in rows.read_text().splitlines():
        ids = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
        inside = False
        said = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for at, one in enumerate(ids):
            if inside:
                logits.append(said[at - 1])
                labels.append(one)
            inside = (inside and one != end) or one == begin
    return torch.stack(logits), torch.tensor(labels)


@pytest.mark.parametrize("case", LAST)
def test_loss_and_gradients_equal_the_live_teacher(
    open_stage: Callable[..., tuple[Any, Any]], pair: tuple[Path, Path, Path, Path], case: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, student, rows, cache = pair
    method, knobs, reg, loss_of = CASES[case]
    settings = {"per_device_train_batch_size": ROWS, "max_grad_norm": 0.0}
    trainer, batches_from = open_stage(cache, method=method, knobs=knobs, student=student, **settings)
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.step = lambda: found.update(
        {name.removeprefix("model."): p.grad.clone() for name, p in trainer.model.named_parameters()}
    )
    step, batches = next(iter(batches_from(0)))
    result = trainer.step(step, batches)

    tokenizer = AutoTokenizer.from_pretrained(student)
    live, own = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64).eval() for one in (teacher, student))
    temperature, length = knobs.get("temperature", 1.0), len(tokenizer)
    with torch.no_grad():
        p_t = (answers(live, tokenizer, rows)[0][:, :length] / temperature).softmax(1)
    logits, labels = answers(own, tokenizer, rows)
    entropy = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    expected = reg * entropy + loss_of(p_t, (logits[:, :length] / temperature).softmax(1))
    expected.backward()
    assert result.loss == pytest.approx(expected.item(), rel=2e-5)
    names = [name for name, p in own.named_parameters() if p.grad is not None]
    assert set(names) == set(found) and len(names) > 15
    parameters = dict(own.named_parameters())
    assert_all_close([found[n].double() for n in names], [parameters[n].grad for n in names], rel=2e-5)
