"""Endless training batches of the demo world, rendered and tokenised in a background process.

Batch ``i`` is a function of ``(seed, i)`` alone, so a resumed run goes on where it stopped. Only train scenes
are drawn.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.demo_training.patch_labels import patch_attributes, patch_words
from benchmarks.demo_training.recipe import TeacherRecipe
from benchmarks.demo_training.tokenizer import load_tokenizer
from pipelines.demo.questions import CAPTION_REQUESTS, QuestionTurn, caption, compare_turn, image_turns
from pipelines.demo.render import pixels_u8
from pipelines.demo.scenes import GRID, Scene, sample_scene
from pipelines.demo.text_turns import text_turn

IGNORED = -100
PLAIN = "plain caption"  # family of a row without roles
Row = tuple[list[Scene], list[QuestionTurn]]


@functools.cache
def _tokenizer():
    return load_tokenizer()


@functools.lru_cache(maxsize=200_000)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(text, add_special_tokens=False))


def encode_row(images: int, turns: list[QuestionTurn]) -> tuple[list[int], list[int]]:
    """``(ids, targets)`` of a conversation; ``targets[t]`` is what row t must predict (token t+1), or ``IGNORED``."""
    user, assistant, end = (_tokenizer().convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>", "<|end|>"))
    placeholder = _tokenizer().convert_tokens_to_ids("<image>")
    ids: list[int] = []
    targets: list[int] = []
    if turns[0].family == PLAIN:  # LLaVA's pre-training form: picture, caption, newline; no roles
        answer = [*_ids(turns[0].answer + "\n")]
        return [*[placeholder] * GRID * GRID, *answer], [IGNORED] * (GRID * GRID - 1) + answer + [IGNORED]
    for i, turn in enumerate(turns):
        ids.append(user)
        for _ in range(images if i == 0 else 0):
            # The last newline belongs to the question's text, as in the chat template.
            ids += [*([] if ids[-1] == user else _ids("\n")), *[placeholder] * GRID * GRID]
        ids += [*_ids(("\n" if i == 0 and images else "") + turn.question), end, assistant]
        targets += [IGNORED] * (len(ids) - len(targets) - 1)
        answer = [*_ids(turn.answer), end]
        ids += answer
        targets += answer
    return ids, [*targets, IGNORED]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """``input_ids/targets [B, T]`` and, in row order, what ``picture_tensors`` gives of the pictures."""
    encoded = [encode_row(len(scenes), turns) for scenes, turns in rows]
    length = -(-max(len(ids) for ids, _ in encoded) // 16) * 16
    pad = _tokenizer().pad_token_id
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded]),
        "targets": torch.tensor([targets + [IGNORED] * (length - len(targets)) for _, targets in encoded]),
    }
    scenes = [scene for scenes, _ in rows for scene in scenes]
    return {**batch, **picture_tensors(scenes)} if scenes else batch


def collate_alone(rows: list[Row]) -> dict[str, torch.Tensor]:
    """As ``collate``, but every turn sees the picture and itself only, at the positions it has when asked first.

    Ordinary rows teach to look answers up in earlier turns; here each of the many turns is a first question. Adds
    ``position_ids [B, T]`` and the boolean ``attention_mask [B, 1, T, T]``. One picture a row.
    """
    encoded = [_encode_alone(turns) for _, turns in rows]
    length = -(-max(len(ids) for ids, *_ in encoded) // 16) * 16
    fill = (_tokenizer().pad_token_id, IGNORED, 0, -1)
    columns = [torch.tensor([row[c] + [fill[c]] * (length - len(row[c])) for row in encoded]) for c in range(len(fill))]
    ids, targets, positions, turn = columns
    mine = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    mask = (mine & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    batch = {"input_ids": ids, "targets": targets, "position_ids": positions, "attention_mask": mask}
    return {**batch, **picture_tensors([scene for scenes, _ in rows for scene in scenes])}


def _encode_alone(turns: list[QuestionTurn]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, targets, positions and turn numbers (0: the picture) of a row of independent turns."""
    first, _ = encode_row(1, turns[:1])
    picture = 1 + GRID * GRID
    ids, targets = first[:picture], [IGNORED] * picture
    positions, numbers = list(range(picture)), [0] * picture
    for number, turn in enumerate(turns, 1):
        row, row_targets = (part[picture:] for part in encode_row(1, [turn]))
        ids += row
        targets += row_targets
        positions += range(picture, picture + len(row))
        numbers += [number] * len(row)
    return ids, targets, positions, numbers


def picture_tensors(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """``pixels uint8 [N, 96, 96, 3]``, ``words [N, 144, 5]``, ``attributes [N, 144, A]``."""
    return {
        "pixels": torch.from_numpy(np.stack([pixels_u8(s) for s in scenes])),
        "words": torch.from_numpy(np.stack([patch_words(s) for s in scenes])).long(),
        "attributes": torch.from_numpy(np.stack([patch_attributes(s) for s in scenes])).long(),
    }


def tower_batch(rng: random.Random, index: int, recipe) -> dict[str, torch.Tensor]:
    """Pictures with their patch labels, no text."""
    return picture_tensors([sample_scene(rng, "train") for _ in range(recipe.tower_batch)])


def full_batch(rng: random.Random, index: int, recipe: TeacherRecipe) -> dict[str, torch.Tensor]:
    """Image rows of many turns; every now and then a text-only or a two-picture batch."""
    if index % recipe.pair_every == recipe.pair_every - 1:
        return collate([_pair_row(rng) for _ in range(recipe.batch // 2)])
    if index % recipe.text_every == recipe.text_every - 1:
        return collate([([], [text_turn(rng) for _ in range(12)]) for _ in range(recipe.batch)])
    if rng.random() < recipe.alone_share:
        scenes = [sample_scene(rng, "train") for _ in range(recipe.batch)]
        return collate_alone([([scene], image_turns(scene, rng, recipe.turns[1])) for scene in scenes])
    return collate([_image_row(rng, recipe) for _ in range(recipe.batch)])


def text_batch(rng: random.Random, index: int, recipe) -> dict[str, torch.Tensor]:
    """The world's text without its pictures: captions, and questions in no relation to any picture."""
    return collate([([], _text_turns(rng)) for _ in range(recipe.text_batch)])


def _image_row(rng: random.Random, recipe: TeacherRecipe) -> Row:
    scene = sample_scene(rng, "train")
    if rng.random() < recipe.plain_share:
        return [scene], [QuestionTurn("", caption(scene), PLAIN)]
    turns = image_turns(scene, rng, rng.randint(*recipe.turns) if rng.random() < 0.25 else recipe.turns[1])
    if rng.random() < recipe.caption_share:
        request = QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(scene), "caption")
        turns = [request] if rng.random() < 0.3 else [*turns[:8], request]
    return [scene], turns


def _pair_row(rng: random.Random) -> Row:
    first, second = (sample_scene(rng, "train", "shapes") for _ in range(2))
    turns = [compare_turn(first, second, rng) for _ in range(6)]
    return [first, second], list({turn.question: turn for turn in turns}.values())


def _text_turns(rng: random.Random) -> list[QuestionTurn]:
    turns = [text_turn(rng) for _ in range(4)]
    turns.append(QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(sample_scene(rng, "train")), "caption"))
    # One turn a scene: a language model may learn what answers look like, but sees nothing to answer from.
    turns += [image_turns(sample_scene(rng, "train"), rng, 1)[0] for _ in range(4)]
    rng.shuffle(turns)
    return turns


@dataclass(frozen=True)
class _Batches(IterableDataset):
    make: Callable
    recipe: object
    seed: str
    start: int

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        index = self.start
        while True:
            yield self.make(random.Random(f"{self.seed}/{index}"), index, self.recipe)
            index += 1


def batches(make: Callable, recipe, seed: str, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches from ``start`` on, made by one background process."""
    return iter(DataLoader(_Batches(make, recipe, seed, start), batch_size=None, num_workers=1, prefetch_factor=8))
