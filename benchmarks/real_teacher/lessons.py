"""The rendered world as lessons: captions and questions as token ids with targets, and the words of every patch."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.demo_training.patch_labels import PATCH_WORDS, patch_words
from pipelines.demo.questions import CAPTION_REQUESTS, QuestionTurn, at, caption, image_turns
from pipelines.demo.scenes import GRID, Scene

IGNORED = -100
PLAIN = "plain"  # family of a row without roles: picture, caption, newline
# Requests of other patterns than the world's own, so that one request means one pattern.
LIST_REQUEST, SENTENCE_REQUEST = "List what you see, one line each.", "What does the image show? Answer in sentences."


@dataclass(frozen=True)
class Encoder:
    """Rows → token ids, exactly as the folder's chat template and processor write them."""

    tokenizer: Any
    placeholder: int  # token id of <image>
    vision_tokens: int  # an image

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[int, ...]]:
        return {}

    def ids(self, text: str) -> tuple[int, ...]:
        """Of a text between special tokens; kept."""
        if text not in self._pieces:
            self._pieces[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return self._pieces[text]

    def row(self, turns: list[QuestionTurn]) -> tuple[list[int], list[int]]:
        """(ids, targets) of one picture and turns about it; ``targets[t]`` is the token behind t where that is an answer's."""
        picture = [self.placeholder] * self.vision_tokens
        parts: list[tuple[tuple[int, ...] | list[int], bool]] = []  # (ids, whether they are answered)
        if turns[0].family == PLAIN:
            parts = [(picture, False), (self.ids(turns[0].answer + "\n"), True)]
        for i, turn in enumerate(turns if turns[0].family != PLAIN else ()):
            parts.append((self.ids("<|im_start|>user\n"), False))
            if i == 0:
                parts += [(picture, False), (self.ids("\n" + turn.question), False)]
            else:
                parts.append((self.ids(turn.question), False))
            parts.append((self.ids("<|im_end|>\n<|im_start|>assistant\n"), False))
            parts += [(self.ids(turn.answer + "<|im_end|>"), True), (self.ids("\n"), False)]
        ids = [one for part, _ in parts for one in part]
        answered = [is_answer for part, is_answer in parts for _ in part]
        following = zip([*ids[1:], 0], [*answered[1:], False])
        return ids, [one if is_answer else IGNORED for one, is_answer in following]


def draw_turns(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    """What one training row says of a scene: a caption in one of the patterns, or three to five questions."""
    kind = rng.random()
    if kind < 0.15:
        return [QuestionTurn("", caption(scene), PLAIN)]
    if kind < 0.4:
        return [QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(scene), "caption")]
    if kind < 0.5:
        return [QuestionTurn(LIST_REQUEST, listed(scene), "caption")]
    if kind < 0.6:
        return [QuestionTurn(SENTENCE_REQUEST, in_sentences(scene), "caption")]
    return image_turns(scene, rng, rng.randint(3, 5))


def listed(scene: Scene) -> str:
    """``"red circle: top left"``, one line a thing."""
    if scene.kind == "shapes":
        return "\n".join(f"{s.color} {s.shape}, {at(s.cell)}" for s in scene.shapes)
    if scene.kind == "chart":
        return "\n".join(f"{b.color} bar, {b.value}" for b in scene.bars)
    return f"{scene.ink} writing, {scene.text}"


def in_sentences(scene: Scene) -> str:
    """The same in whole sentences."""
    if scene.kind == "shapes":
        return " ".join(f"There is a {s.color} {s.shape} {at(s.cell)}." for s in scene.shapes)
    if scene.kind == "chart":
        return " ".join(f"The {b.color} bar has the value {b.value}." for b in scene.bars)
    return f"The image shows {scene.text}, written in {scene.ink}."


def collate(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows, tokens] twice, padded on the right, where a causal model does not look."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([one + [0] * (length - len(one)) for one, _ in rows])
    return ids, torch.tensor([one + [IGNORED] * (length - len(one)) for _, one in rows])


def word_targets(embeddings: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """float32 [words, D]: what a patch of this word shall be for the language model, the mean of the word's own tokens.

    Args:
        embeddings: the input embeddings [V, D].
    """
    spaced = [" " + one.strip() if one.strip().islower() else one for one in PATCH_WORDS]
    ids = [tokenizer.encode(one, add_special_tokens=False) for one in spaced]
    return torch.stack([embeddings[one].float().mean(0) for one in ids])


def patch_targets(scene: Scene, words: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([side², D] the words' sum over √count, [side²] weights: background is most of a picture and counts a tenth).

    The world labels 12 × 12 patches; a coarser one takes the label at its centre.
    """
    centres = [int((i + 0.5) * GRID / side) for i in range(side)]
    labels = patch_words(scene).reshape(GRID, GRID, -1)[np.ix_(centres, centres)].reshape(side * side, -1)
    chosen = torch.from_numpy(labels.astype(np.int64))
    there = (chosen >= 0).float()
    sums = (words[chosen.clamp(min=0)] * there[..., None]).sum(1)
    return sums / there.sum(1, keepdim=True).sqrt(), torch.where(chosen[:, 0] == 0, 0.1, 1.0)
