"""The live teacher, loaded when it is first asked and let go before somebody else needs its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.judge.fidelity.sources import listen
from pipelines.processes.memory import give_back
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers import backends
from teacher_cache.teachers.backends import OpenTeacher
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.wants import Wants


class LiveTeacher:
    """A teacher on demand."""

    def __init__(self, spec: TeacherSpec, processor: Any, config: Any):
        self.spec, self.processor, self.config = spec, processor, config
        self._loaded: OpenTeacher | None = None

    @property
    def model(self) -> OpenTeacher:
        if self._loaded is None:
            self._loaded = backends.open_teacher(self.spec, self.processor, self.config)
        return self._loaded

    @property
    def head(self) -> torch.Tensor:
        """W ``[V, D]`` on the CPU; CompatibilityError where logits are no product with it."""
        return backends.linear_head(self.model).cpu()

    def listen(self, rows: Sequence[Prepared], wants: Wants, batch_tokens: int) -> list[TeacherOutput]:
        return listen(self.model, rows, wants, batch_tokens)

    def release(self) -> None:
        self._loaded = None
        backends.release()
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
