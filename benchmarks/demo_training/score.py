"""Exact match by family on held-out single questions, beside two baselines that see no picture."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.demo_training.model import normalised
from benchmarks.demo_training.stream import IGNORED, collate, encode_row, picture_tensors
from benchmarks.demo_training.tokenizer import load_tokenizer
from pipelines.demo.questions import FAMILIES, QuestionTurn, image_turns
from pipelines.demo.scenes import Scene, sample_scene
from pipelines.demo.text_turns import text_turn
from pipelines.demo.world import KIND_OF_FAMILY

Question = tuple[list[Scene], QuestionTurn]


def questions(split: str, per_family: int, seed: int) -> list[Question]:
    """``per_family`` single questions of every family, each on its own picture of ``split``."""
    rng = random.Random(f"questions/{split}/{seed}")
    found: list[Question] = []
    for family in FAMILIES:
        wanted = len(found) + per_family
        while len(found) < wanted:
            if family == "text":
                found.append(([], text_turn(rng)))
                continue
            scene = sample_scene(rng, split, KIND_OF_FAMILY.get(family, "shapes"))
            found += [([scene], turn) for turn in image_turns(scene, rng, 1, family)]
    return found


@torch.no_grad()
def teacher_forced_accuracy(model: LlavaForConditionalGeneration, asked: list[Question]) -> dict[str, float]:
    """Exact match by family; the arg-max of every answer row under teacher forcing is right exactly when greedy is."""
    right: dict[str, list[bool]] = defaultdict(list)
    for group in _same_kind(asked, 32):
        batch = collate([(scenes, [turn]) for scenes, turn in group])
        pixels = normalised(batch["pixels"]).to(model.dtype) if "pixels" in batch else None
        hidden = model.model(input_ids=batch["input_ids"], pixel_values=pixels, use_cache=False).last_hidden_state
        rows = batch["targets"] != IGNORED
        wrong = torch.zeros_like(rows)
        wrong[rows] = model.lm_head(hidden[rows]).argmax(-1) != batch["targets"][rows]
        for (_, turn), bad in zip(group, wrong.any(1).tolist()):
            right[turn.family].append(not bad)
    return {family: sum(values) / len(values) for family, values in right.items()}


@torch.no_grad()
def greedy_answers(model: Any, asked: list[Question], *, blank: bool = False) -> list[str]:
    """Answers by greedy decoding; ``blank`` shows a plain light-grey picture instead of the real one."""
    tokenizer = load_tokenizer()
    answers: dict[int, str] = {}
    for group in _same_kind(list(enumerate(asked)), 32, kind=lambda item: bool(item[1][0])):
        prompts = [_prompt(scenes, turn) for _, (scenes, turn) in group]
        length = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (length - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
        }
        scenes = [scene for _, (scenes, _) in group for scene in scenes]
        if scenes:
            pixels = normalised(picture_tensors(scenes)["pixels"])
            inputs["pixel_values"] = (torch.full_like(pixels, 0.9) if blank else pixels).to(model.dtype)
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, length:]
        for (i, _), ids in zip(group, new):
            answers[i] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return [answers[i] for i in range(len(asked))]


def score_table(model: Any, per_family: int = 200, seed: int = 1) -> dict[str, dict]:
    """``{family: {teacher, majority, blank_image, questions}}`` on the held-out split, exact match in [0, 1]."""
    asked = questions("heldout", per_family, seed)
    given = greedy_answers(model, asked)
    blank = greedy_answers(model, asked, blank=True)
    usual = _majority_answers(questions("train", per_family * 4, seed))
    table: dict[str, dict] = {}
    for family in FAMILIES:
        chosen = [i for i, (_, turn) in enumerate(asked) if turn.family == family]
        truth = [asked[i][1].answer for i in chosen]
        table[family] = {
            "teacher": _share(truth, [given[i] for i in chosen]),
            "majority": _share(truth, [usual[family]] * len(chosen)),
            "blank_image": _share(truth, [blank[i] for i in chosen]),
            "questions": len(chosen),
        }
    return table


def _prompt(scenes: list[Scene], turn: QuestionTurn) -> list[int]:
    ids, targets = encode_row(len(scenes), [turn])
    return ids[: next(t for t, target in enumerate(targets) if target != IGNORED) + 1]


def _majority_answers(asked: list[Question]) -> dict[str, str]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for _, turn in asked:
        counts[turn.family][turn.answer] += 1
    return {family: counter.most_common(1)[0][0] for family, counter in counts.items()}


def _share(truth: list[str], given: list[str]) -> float:
    return sum(a == b for a, b in zip(truth, given)) / len(truth)


def _same_kind(items: list, size: int, kind=lambda item: bool(item[0])):
    """Batches that are all with, or all without, a picture."""
    for wanted in (True, False):
        chosen = [item for item in items if kind(item) == wanted]
        for i in range(0, len(chosen), size):
            yield chosen[i : i + size]
