"""A teacher without weights: made-up signals of real shape, to try whole jobs at their full number of rows where there is no GPU.

``null:FOLDER`` takes processor and widths of a model folder (or hub id) and reads no weights. Settings follow after commas:
``null:FOLDER,width=64,ms_per_row=2.5``. What it says is a pure function of the row's key, the kind of signal and the place in the
row: no batch, worker or machine has a say in it. The numbers mean nothing: its fingerprint says ``null``, and training says so too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from teacher_cache.errors import KdcliError
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import Sampled, TopK
from teacher_cache.teachers import transformers
from teacher_cache.teachers.sampling import uniforms
from teacher_cache.teachers.transformers import TeacherSpec, resolve_dtype
from teacher_cache.wants import Wants

BACKEND = "null"
PREFIX = f"{BACKEND}:"
NOTE = "of the null teacher, whose signals are fake: nothing can be learnt from them"
VERSION = 1
"""Of the made-up numbers: others are another teacher."""
HEAD_BLOCK = 1024
"""Rows of the head that are drawn at once."""
GRAM_WIDTH = 8


@dataclass(frozen=True)
class NullSettings:
    """What stands behind ``null:``.

    Attributes:
        folder: whose processor and configuration are taken.
        width: D of hidden states; 0: the model's own. ms_per_row: milliseconds that a GPU would take for a row, slept through.
    """

    folder: str
    width: int = 0
    ms_per_row: float = 0.0


def null_settings(teacher: str) -> NullSettings:
    """KdcliError where the id of the teacher is not ``null:FOLDER[,width=D][,ms_per_row=X]``."""
    folder, *given = teacher.removeprefix(PREFIX).split(",")
    kinds = {"width": int, "ms_per_row": float}
    values: dict[str, Any] = {}
    for one in given:
        name, _, text = one.partition("=")
        try:
            values[name] = kinds[name](text)
        except (KeyError, ValueError):
            values[name] = math.nan
        if not 0 <= values[name] < math.inf:
            raise KdcliError(f"teacher {teacher!r}: write null:FOLDER,width=D,ms_per_row=X, got {one!r}")
    if not folder:
        raise KdcliError(f"teacher {teacher!r}: name the model folder that the processor comes from, null:FOLDER")
    return NullSettings(folder, **values)


def folder_of(teacher: str) -> str:
    """Where a teacher's files lie: the model's folder or hub id, also of ``null:FOLDER``."""
    return null_settings(teacher).folder if teacher.startswith(PREFIX) else teacher


def load_processor(spec: TeacherSpec) -> tuple[Any, Any]:
    return transformers.load_processor(replace(spec, id=null_settings(spec.id).folder))


def teacher_reads_images(spec: TeacherSpec) -> bool:
    return transformers.teacher_reads_images(replace(spec, id=null_settings(spec.id).folder))


def teacher_fingerprint(spec: TeacherSpec, processor: Any, config: Any) -> dict[str, Any]:
    """Has the entries of a real teacher's; how long it sleeps decides no number."""
    return {
        "weights": f"{PREFIX}{VERSION}",
        "architecture": BACKEND,
        "head_width": int(config.get_text_config().vocab_size),
        "hidden_size": hidden_width(spec, config),
        **processor_fingerprint(processor),
        "dtype": str(resolve_dtype(spec, config)).removeprefix("torch."),
        "attn_implementation": BACKEND,
        "backend": BACKEND,
    }


def hidden_width(spec: TeacherSpec, config: Any) -> int:
    return null_settings(spec.id).width or int(config.get_text_config().hidden_size)


class NullTeacher:
    """Stands where ``TransformersTeacher`` does. ``vocabulary``: of the tokenizer, as a real head without padding rows has it."""

    def __init__(self, spec: TeacherSpec, processor: Any, config: Any):
        self._seconds_per_row = null_settings(spec.id).ms_per_row / 1e3
        self._heads = int(config.get_text_config().num_attention_heads)
        self.width, self.dtype = hidden_width(spec, config), resolve_dtype(spec, config)
        self.vocabulary = min(len(processor.tokenizer), int(config.get_text_config().vocab_size))
        self.pad_id = processor.tokenizer.pad_token_id or 0

    @property
    def state_bytes(self) -> int:
        """Of one hidden state as it is told."""
        return self.width * self.dtype.itemsize

    @cached_property
    def head(self) -> torch.Tensor:
        """W ``[V, D]``: calibrations are fitted with it. What ``topk`` says is not h·Wᵀ: a product would be no null teacher."""
        blocks = range(0, self.vocabulary, HEAD_BLOCK)
        drawn = [self._states(f"head/{at}", "head", min(HEAD_BLOCK, self.vocabulary - at)) for at in blocks]
        return torch.cat(drawn) / math.sqrt(self.width)

    def __call__(self, prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        """What the fields want of each row, on the CPU."""
        if self._seconds_per_row:
            time.sleep(self._seconds_per_row * len(prepared))
        return [self._say(one, wants) for one in prepared]

    def _say(self, row: Prepared, wants: Wants) -> TeacherOutput:
        rows = {
            "vision": len(row.vision_positions),
            "response": len(row.response_rows),
            "text": len(row.text_positions),
        }
        return TeacherOutput(
            hidden={kind: self._states(row.key, kind, rows[kind]) for kind in wants.hidden},
            topk={kind: self._topk(row.key, kind, rows[kind], k) for kind, k in wants.topk.items()},
            gram=self._gram(row.key, rows["vision"]) if wants.gram else None,
            layout=row.layout,
            sampled={kind: self._sampled(row.key, kind, rows[kind], one.size) for kind, one in wants.sampled.items()},
            attention={
                layer: self._attention(row, layer, 1 if heads == "mean" else self._heads)
                for layer, heads in wants.attention.items()
            },
            features=self._states(row.key, "features", rows["vision"]) if wants.features else None,
        )

    def _states(self, key: str, kind: str, rows: int) -> torch.Tensor:
        """``[rows, D]`` of variance 1."""
        return ((uniforms(VERSION, key, kind, rows, self.width) - 0.5) * math.sqrt(12)).to(self.dtype)

    def _topk(self, key: str, kind: str, rows: int, k: int) -> TopK:
        """Geometric distributions, p_j = (1 − q)·q^j with a q of its own for every row: head and tail add up to 1."""
        k = min(k, self.vocabulary)
        drawn = uniforms(VERSION, key, f"topk.{kind}", rows, 4)
        log_q = (0.05 + 0.9 * drawn[:, :1]).log()
        places = torch.arange(k)
        log_rest = k * log_q[:, 0]
        whole = torch.log1p(-log_q.exp())
        if k == self.vocabulary:  # nothing is left for a tail
            whole = whole - torch.log1p(-log_rest.exp())[:, None]
            log_rest = torch.full_like(log_rest, -torch.inf)
        log_z = 10 + 10 * drawn[:, 3]
        return TopK(
            _distinct_ids(drawn[:, 1:3], k, self.vocabulary),
            (whole + places * log_q).float(),
            log_rest.float(),
            log_z.float(),
        )

    def _sampled(self, key: str, kind: str, rows: int, size: int) -> Sampled:
        """Flat: one draw an id, what is left over for the first."""
        k = min(size, self.vocabulary)
        drawn = uniforms(VERSION, key, f"sampled.{kind}", rows, 3)
        weights = torch.full((rows, k), 1 / size)
        weights[:, 0] = 1 - (k - 1) / size
        entropy = drawn[:, 2] * math.log(self.vocabulary)
        return Sampled(_distinct_ids(drawn[:, :2], k, self.vocabulary), weights, entropy.float())

    def _gram(self, key: str, rows: int) -> torch.Tensor:
        logits = uniforms(VERSION, key, "gram", rows, GRAM_WIDTH).float()
        return logits @ logits.T

    def _attention(self, row: Prepared, layer: int, heads: int) -> torch.Tensor:
        """Text tokens before the first vision token pay nothing, the others share what is left evenly."""
        text, vision = len(row.text_positions), len(row.vision_positions)
        paid = uniforms(VERSION, row.key, f"attention.{layer}", heads * text, 1).float().view(heads, text, 1) / max(
            1, vision
        )
        if vision:
            paid = paid * (row.text_positions > row.vision_positions.min())[None, :, None]
        return paid.expand(heads, text, vision).contiguous()


def _distinct_ids(drawn: torch.Tensor, k: int, vocabulary: int) -> torch.Tensor:
    """int64 ``[R, k]``: from a start in steps around the vocabulary, too short to meet an id twice. drawn: ``[R, 2]`` in [0, 1)."""
    start = (drawn[:, :1] * vocabulary).long()
    step = 1 + (drawn[:, 1:2] * (vocabulary // k)).long()
    return (start + torch.arange(k) * step) % vocabulary
