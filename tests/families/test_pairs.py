"""Teachers and students of two families: EM-KD's own pair, one vocabulary under heads of other widths, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from student_train.load_student import load_student
from student_train.losses.matching import UNMATCHED
from teacher_cache.errors import CompatibilityError
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.teachers.transformers import TeacherSpec, load_processor
from tests.contracts.dense_reference import in_float64, live_view, load64, reference, teacher_batch
from tests.contracts.test_methods import loss_and_gradients
from tests.families.rows import CHAT, read_rows

CODED = 5e-3
"""Cosines are stored in 1/127."""


def assert_step_is_the_live_teachers(cache: Path, teacher: Path, trainer: Any, one: Any) -> None:
    """Loss, terms and gradients of the step, against both whole models in float64."""
    parts = load_processor(TeacherSpec(str(teacher)))
    theirs = teacher_batch(cache, ("caption", "sft"), one.batch.keys, parts)
    view = live_view(load64(teacher), in_float64(theirs), len(parts[0].tokenizer), one.text)
    expected_loss, expected_terms, expected = reference(trainer, one, view)
    loss, terms, gradients = loss_and_gradients(trainer, [one])
    assert loss == pytest.approx(expected_loss, rel=CODED)
    assert terms == pytest.approx(expected_terms, rel=CODED, abs=1e-5)
    assert gradients.keys() == expected.keys()
    error = torch.cat([(gradients[name].double() - wide).flatten() for name, wide in expected.items()]).norm()
    assert error <= CODED * torch.cat([wide.flatten() for wide in expected.values()]).norm()


PAIR_VIEWS = {
    "square": ([(5, 5, 0), (10, 10, 1)], [(2, 2, 0), (4, 4, 1)]),
    "wide": ([(5, 5, 0), (6, 15, 1)], [(2, 2, 0), (2, 4, 1)]),
    "tall": ([(5, 5, 0), (15, 6, 1)], [(2, 2, 0), (4, 2, 1)]),
}
"""(rows, columns, newlines) of every view, by image: OneVision's 5 × 5 a tile beside LLaVA-NeXT's 4 × 4 pooled to 2 × 2."""


def patches(views: list[tuple[int, int, int]], first: int) -> tuple[list[list[int]], int]:
    """Row numbers of every view's patches, and the first row after them."""
    found = []
    for rows, columns, newline in views:
        step = columns + newline
        found.append([first + row * step + column for row in range(rows) for column in range(columns)])
        first += rows * step
    return found, first


def test_em_kds_own_pair(
    folder_of: Any, captured: Callable[..., Path], open_step: Callable[..., Any], rows_folder: Path, tmp_path: Path
) -> None:
    """OneVision (an odd grid, tiles, newlines) → LLaVA-NeXT with every tile pooled before packing; `<video>` is the teacher's alone."""
    teacher, student = folder_of("llava-onevision"), folder_of("llava-next", width=48, extra_rows=9, seed=2)
    cache = captured(teacher)
    trainer, one = open_step(cache, student, "em-kd")
    assert_step_is_the_live_teachers(cache, teacher, trainer, one)
    assert_matched_as_by_hand(cache, teacher, trainer, one, rows_folder)

    settings = TrainSettings(student=str(student), output_dir=str(tmp_path / "run"), max_steps=1, report_to="none")
    result = train(str(cache), "em-kd", Settings(train=settings), "PT,DFT")
    model, processor = load_student(result["model"], "sdpa")
    row = Preparer(processor, model.config).prepare(read_rows(rows_folder)[1])
    grids = [(*view.grid, int(view.newline)) for view in row.layout[0].views]
    assert grids == PAIR_VIEWS["wide"][1]
    with torch.no_grad():
        inputs = {"input_ids": row.input_ids[None], **row.pixels}
        assert model.eval()(**inputs).logits.isfinite().all()
    stock = load_file(student / "model.safetensors")
    assert load_file(Path(result["model"]) / "model.safetensors").keys() == stock.keys(), "pooling has no weights"


@torch.no_grad()
def assert_matched_as_by_hand(cache: Path, teacher: Path, trainer: Any, one: Any, rows_folder: Path) -> None:
    """scipy on the dense cost of every view's rows (of the whole image where a row has two), by grids written down above."""
    parts = load_processor(TeacherSpec(str(teacher)))
    theirs = in_float64(teacher_batch(cache, ("caption", "sft"), one.batch.keys, parts))
    view = live_view(load64(teacher), theirs, len(parts[0].tokenizer), one.text)
    hidden = trainer.model(one.batch, trainer.kinds, None)
    rows = trainer.model.rows(hidden, one.batch, one.student_text)
    matched = trainer.matching.match(view, rows, one, torch.Generator()).tolist()
    left = view.raw_vision.logits()  # type: ignore[union-attr]
    right = (hidden["vision"] @ trainer.model.head.T).double()[:, : left.shape[1]]
    starts = [0, 0]
    checked = 0
    for theirs_layout, ours_layout in zip(one.layouts, one.student_layouts):
        assert len(theirs_layout) == len(ours_layout)
        for image in theirs_layout:
            kind = {(48, 48): "square", (96, 40): "wide", (32, 88): "tall"}[image.size]
            of_teacher, of_student = PAIR_VIEWS[kind]
            if len(theirs_layout) > 1:  # OneVision sees each of several images as one view and a newline
                of_teacher = [(5, 5, 0)]
            (t, end_t), (s, end_s) = patches(of_teacher, starts[0]), patches(of_student, starts[1])
            if len(t) != len(s):
                t, s, end_t = [t[0]], [[*s[0], *s[1]]], end_t + 1
            for group_t, group_s in zip(t, s):
                cost = (left[group_t][:, None] - right[group_s][None]).abs().sum(2)
                at, column = linear_sum_assignment(cost.numpy())
                best = {group_s[j]: group_t[i] for i, j in zip(at, column)}
                assert {j: matched[j] for j in group_s} == best
                checked += len(group_s)
            starts = [end_t, end_s]
    assert starts == [len(left), len(right)] and checked == sum(number != UNMATCHED for number in matched)


@pytest.mark.parametrize("name, rows", [("llava-1.5", (9, 0)), ("qwen2.5-vl", (0, 12)), ("internvl3", (3, 1))])
def test_heads_of_other_widths_over_one_vocabulary(
    name: str, rows: tuple[int, int], folder_of: Any, captured: Callable[..., Path], open_step: Callable[..., Any]
) -> None:
    """151,936 beside 152,064 rows, in small: only columns of the tokenizer are compared."""
    teacher = folder_of(name, extra_rows=rows[0], seed=5)
    student = folder_of(name, width=48, extra_rows=rows[1], seed=6)
    cache = captured(teacher)
    trainer, one = open_step(cache, student, "kd")
    assert_step_is_the_live_teachers(cache, teacher, trainer, one)
    fingerprint = TeacherCache(str(cache)).fields["response_hidden"]["teacher"]
    assert fingerprint["head_width"] == fingerprint["tokenizer"]["length"] + rows[0]


def test_two_families_of_one_tokenizer(
    folder_of: Any, captured: Callable[..., Path], open_step: Callable[..., Any]
) -> None:
    """Qwen2.5-VL → Qwen3-VL: equal strings under equal ids, M-RoPE of two kinds, heads of two widths."""
    teacher, student = folder_of("qwen2.5-vl"), folder_of("qwen3-vl", width=48, extra_rows=11, seed=2)
    cache = captured(teacher)
    trainer, one = open_step(cache, student, "em-kd", compressor="none")
    assert_step_is_the_live_teachers(cache, teacher, trainer, one)


@pytest.mark.parametrize(
    "teacher, student, reason",
    [
        ("internvl3", "qwen2.5-vl", r"id 4160 is '<img>' for the teacher and '<\|vision_start\|>' for the student"),
        (
            "qwen3-vl",
            "llava-onevision",
            r"id 4160 is '<\|vision_start\|>' for the teacher and '<video>' for the student",
        ),
    ],
)
def test_another_tokenizer_is_refused_with_its_reason(
    teacher: str, student: str, reason: str, folder_of: Any, captured: Callable[..., Path], tmp_path: Path
) -> None:
    """Before any weights are read: the student has none."""
    cache = captured(folder_of(teacher))
    folder = Path(shutil.copytree(folder_of(student), tmp_path / "student"))
    (folder / "model.safetensors").unlink()
    settings = TrainSettings(student=str(folder), output_dir=str(tmp_path / "run"), max_steps=1, report_to="none")
    with pytest.raises(CompatibilityError, match=f"another tokenizer: {reason}: give the student") as caught:
        train(str(cache), "kd", Settings(train=settings), "DFT")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pixel_shuffle", "tokenpacker"])
def test_other_compressors_of_tiles(name: str, folder_of: Any, rows_folder: Path, tmp_path: Path) -> None:
    """As with pooling: as many tokens as places, saved and read back bit by bit."""
    from student_train.compressors import CompressorSpec
    from student_train.load_student import save_student

    torch.manual_seed(4)
    model, processor = load_student(str(folder_of("llava-next")), "sdpa", compressor=CompressorSpec(name))
    save_student(model, processor, tmp_path / "student")
    again, _ = load_student(str(tmp_path / "student"), "sdpa")
    for sample, (kinds, _) in zip(read_rows(rows_folder), CHAT):
        row = Preparer(processor, model.config).prepare(sample)
        assert [[(*v.grid, int(v.newline)) for v in one.views] for one in row.layout] == [
            PAIR_VIEWS[kind][1] for kind in kinds
        ]
        inputs = {"input_ids": row.input_ids[None], **row.pixels}
        with torch.no_grad():
            assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    "family, compressor, reason",
    [
        ("llava-next", "mqt", "keeps the first tokens of an image.*use --compressor adaptive_pool"),
        ("llava-onevision", "adaptive_pool", "is of family llava_onevision: compressors need"),
        ("qwen3-vl", "adaptive_pool", "is of family qwen3_vl: compressors need"),
        ("gemma-3", "adaptive_pool", "is of family gemma3: compressors need"),
    ],
)
def test_compressors_that_do_not_fit_are_refused(family: str, compressor: str, reason: str, folder_of: Any) -> None:
    from student_train.compressors import CompressorSpec
    from student_train.load_student import open_student

    with pytest.raises(CompatibilityError, match=reason) as caught:
        open_student(str(folder_of(family)), compressor=CompressorSpec(compressor))
    assert "\n" not in str(caught.value)
