"""A live teacher behind the interface of a cached one: the same losses, fed by a forward pass inside the step."""

from __future__ import annotations

from dataclasses import replace

import torch

from student_train.dataset import TrainBatch
from student_train.needs import Served
from student_train.teacher_view import TeacherHeads, TeacherView
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor

HIDDEN = {
    "response_logits": ("response_hidden",),
    "vision_logits": ("vision_hidden",),
    "vision_relation": ("vision_hidden",),
}
"""What serves each need where hidden states are at hand."""


class LiveTeacher:
    """Reads the student's own batch: both models must read the same pixels and tokens (the demo's do)."""

    def __init__(self, teacher: TransformersTeacher, device: torch.device):
        self.teacher, self.device = teacher, device
        heads = {f"{kind}_hidden": teacher.head for kind in ("response", "vision")}
        self.signals = TeacherHeads(Served(HIDDEN, ()), heads, teacher.vocabulary, device)

    @classmethod
    def opener(cls, teacher: str):
        """``open_signals`` of ``pipelines.train.train_student.train``: the teacher's folder takes the cache's place."""

        def open_signals(cache: TeacherCache, served: Served, device: torch.device) -> LiveTeacher:
            spec = TeacherSpec(teacher, dtype="float32", device=str(device))
            return cls(TransformersTeacher(spec, *load_processor(spec)), device)

        return open_signals

    def view(self, batch: TrainBatch) -> TeacherView:
        moved = batch.batch.to(self.device)
        states = self.teacher.hidden(moved)
        fields = {
            f"{kind}_hidden": list(states[moved.rows[kind]].float().split(list(moved.counts[kind])))
            for kind in ("response", "vision")
        }
        return self.signals.view(replace(batch, fields=fields))
