"""The trainings' moving parts, on the small model and a few steps: nothing here learns, everything here must hold."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.demo_training import lessons
from benchmarks.demo_training.loop import Group, Masters, Phase
from benchmarks.demo_training.model import STUDENT, build_model
from benchmarks.demo_training.recipe import StudentRecipe, TeacherRecipe
from benchmarks.demo_training.stream import IGNORED, collate, collate_alone, full_batch, text_batch, tower_batch
from benchmarks.demo_training.tokenizer import load_tokenizer
from pipelines.demo.questions import image_turns
from pipelines.demo.scenes import sample_scene

RECIPE = replace(TeacherRecipe(), batch=2, tower_batch=2, steps=2, text_every=3, pair_every=4)


@pytest.fixture()
def model():
    return build_model(STUDENT, load_tokenizer(), seed=0)


def test_turns_that_see_only_themselves_compute_what_single_questions_compute(model):
    rng = random.Random(0)
    scene = sample_scene(rng, "train", "shapes")
    turns = image_turns(scene, rng, 4)
    batch = collate_alone([([scene], turns)])
    together, _ = lessons.answer_loss(model, batch, lessons.patch_word_ids(), 0.0, 0)
    total = tokens = 0.0
    for turn in turns:
        single = collate([([scene], [turn])])
        count = int((single["targets"] != IGNORED).sum())
        total += count * lessons.answer_loss(model, single, lessons.patch_word_ids(), 0.0, 0)[0].item()
        tokens += count
    assert together.item() == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_every_kind_of_batch_gives_finite_gradients(model, index):
    batch = full_batch(random.Random(index), index, RECIPE)
    loss, _ = lessons.answer_loss(model, batch, lessons.patch_word_ids(), 0.3, 16)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_language_model_of_the_student_start_sees_no_picture():
    batch = text_batch(random.Random(0), 0, replace(StudentRecipe(), text_batch=3))
    image = load_tokenizer().convert_tokens_to_ids("<image>")
    assert "pixels" not in batch and not (batch["input_ids"] == image).any()


def test_a_resumed_phase_equals_an_undisturbed_one(tmp_path):
    """Same batches, same masters, whether or not the run stopped in between."""

    def run(folder, stops):
        folder.mkdir(exist_ok=True)
        for i, steps in enumerate(stops):
            model = build_model(STUDENT, load_tokenizer(), seed=0)
            torch.manual_seed(0)
            heads = lessons.AttributeHeads(STUDENT.text_width)
            masters = Masters([Group(model), Group(heads)], 1e-3, RECIPE)
            constant = replace(RECIPE, warmup=0.0, floor=1.0)  # the schedule must not know how many steps come
            phase = Phase("tower", steps, None, folder, constant)
            loss_of = partial(lessons.tower_loss, model, heads, word_ids=lessons.patch_word_ids(), attribute_weight=0.5)
            phase.run(masters, loss_of, endless, resume=i > 0)
        return torch.load(folder / "tower.pt", weights_only=True)

    def endless(start):
        while True:
            yield tower_batch(random.Random(start), start, RECIPE)
            start += 1

    whole, parts = run(tmp_path / "whole", [3]), run(tmp_path / "parts", [2, 3])
    assert whole["step"] == parts["step"] == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole["masters"], parts["masters"]))
