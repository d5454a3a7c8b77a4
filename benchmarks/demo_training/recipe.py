"""Every constant of the demo's trainings, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherRecipe:
    """Phase A teaches the tower patch by patch; phase B the whole model on questions, captions and text.

    The shipped weights were trained while this recipe was being found: see ``pipelines/demo/assets/README.md``.
    """

    seed: int = 17
    # Phase A: 144 labelled patches an image make the densest lesson there is.
    tower_steps: int = 1200
    tower_batch: int = 32  # images
    tower_learning_rate: float = 1e-3
    attribute_weight: float = 1.0
    # Phase B
    steps: int = 4500
    batch: int = 12  # rows; about ten questions each. Twice the steps teach more than twice the rows
    learning_rate: float = 7e-4
    tower_learning_rate_ratio: float = 0.3  # the tower has already learned: move it more slowly
    turns: tuple[int, int] = (1, 14)
    caption_share: float = 0.25  # of the image rows end with a dense caption
    plain_share: float = 0.04  # of the image rows are a picture and its caption, without roles
    alone_share: float = 0.8  # of the image batches hide the turns of a row from each other
    text_every: int = 10  # every n-th batch is text-only
    pair_every: int = 25  # every n-th batch shows two pictures a row
    vision_weight: float = 0.3  # of the patch-word loss at the vision tokens themselves
    vision_rows: int = 24  # vision tokens a picture that take part in that loss
    # Both
    warmup: float = 0.03  # of the phase
    floor: float = 0.02  # of the peak learning rate, at the end
    weight_decay: float = 0.05
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class StudentRecipe:
    """Tower from patches, language model from text; the two never meet before the student's own training."""

    seed: int = 29
    tower_steps: int = 500
    tower_batch: int = 32
    tower_learning_rate: float = 2e-3
    attribute_weight: float = 0.0  # words of patches only: no counting, no layout
    text_steps: int = 550
    text_batch: int = 24
    text_learning_rate: float = 2e-3
    warmup: float = 0.05
    floor: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
