"""Rows of trained models for the codec benchmark: what a teacher says at vision and response rows, and a student at the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.text_corpus import english_pieces
from pipelines.demo.run import STUDENT_START, TEACHER
from pipelines.demo.write_world import write_world
from teacher_cache.capturing.cache_shard import ask
from teacher_cache.models.head import topk_rows
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared, SkipRecord, TeacherOutput, TextTokens
from teacher_cache.sources import DataSpec, open_source
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor
from teacher_cache.wants import Wants

LARGEST_K = 128
PROMPT = 16
PIECE = 256 + PROMPT
"""Tokens."""


@dataclass
class Rows:
    """One kind of rows of one teacher, sample by sample.

    Attributes:
        kind: ``vision`` or ``response``, which names the fields. head: W ``[V, D]``.
        calibration, test: samples for fitting, and others for measuring: hidden states (all three kinds for the demo) and top-128.
        prepared: of the test samples (keys; what a sampler draws from). student: its outputs on the test samples; student_head.
    """

    name: str
    kind: str
    head: torch.Tensor
    calibration: list[TeacherOutput]
    test: list[TeacherOutput]
    prepared: list[Prepared]
    student: list[TeacherOutput]
    student_head: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        """float32 ``[R, D]``: the test rows of all samples."""
        return torch.cat([one.hidden[self.kind] for one in self.test]).to(torch.float32)

    @property
    def student_hidden(self) -> torch.Tensor:
        """float32 ``[R, D_s]``: the student at the same rows."""
        return torch.cat([one.hidden[self.kind] for one in self.student]).to(torch.float32)


def demo_rows(folder: Path, calibration: int, test: int) -> list[Rows]:
    """Vision and response rows of the shipped teacher on demo rows, and the shipped student before any distillation."""
    captions = (calibration + test) // 4
    world = write_world(folder, captions=captions, train=calibration + test - captions, heldout=7, seed=11)
    specs = (
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", world.train, template="chat"),
    )
    processor, config = load_processor(TeacherSpec(str(TEACHER)))
    prepared = _prepare(specs, Preparer(processor, config))
    order = torch.randperm(len(prepared), generator=torch.Generator().manual_seed(0)).tolist()
    fit, measured = ([prepared[i] for i in part] for part in (order[:calibration], order[calibration:]))
    teacher, student = (_model(path, processor) for path in (TEACHER, STUDENT_START))
    said, fitted = listen(teacher, measured), listen(teacher, fit)
    student_said = listen(student, measured)
    return [
        Rows(
            f"demo teacher, {kind}",
            kind,
            teacher.head,
            fitted,
            said,
            measured,
            student_said,
            student.head,
        )
        for kind in ("vision", "response")
    ]


def _model(folder: Path, processor: Any) -> TransformersTeacher:
    spec = TeacherSpec(str(folder), dtype="float32", device="cpu")
    return TransformersTeacher(spec, processor, load_processor(spec)[1])


def _prepare(specs: Sequence[DataSpec], preparer: Preparer) -> list[Prepared]:
    rows = []
    for spec in specs:
        source = open_source(spec)
        for group in source.scan(500):
            for row in source.read(group):
                if not isinstance(row, SkipRecord):
                    rows.append(preparer.prepare(row, spec.template, spec.max_image_pixels))
    return rows


def listen(model: TransformersTeacher, prepared: Sequence[Prepared]) -> list[TeacherOutput]:
    """Hidden states of vision, response and text rows and the largest top-k, sample by sample."""
    kinds = ("vision", "response")
    wants = Wants(hidden={*kinds, "text"}, topk=dict.fromkeys(kinds, LARGEST_K))
    return ask(model, prepared, wants, 8192)


@torch.inference_mode()
def text_rows(folder: Path, calibration: int, test: int) -> Rows:
    """Response rows of a language model on documentation, behind a prompt of ``PROMPT`` tokens a piece; its early exit, after two thirds of
    its layers, is the student. The first pieces fit, those behind them are measured.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = english_pieces(lambda text: tokenizer(text)["input_ids"], PIECE, calibration + test)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = model.get_output_embeddings().weight.detach().to(torch.float32)
    outputs, exits = [], []
    for piece in tokens:
        states = model.model(piece[None], output_hidden_states=True)
        hidden = states.last_hidden_state[0, PROMPT:].to(torch.float32)
        outputs.append(TeacherOutput({"response": hidden}, {"response": topk_rows(hidden, head, LARGEST_K)}))
        early = model.model.norm(states.hidden_states[model.config.num_hidden_layers * 2 // 3])
        exits.append(TeacherOutput({"response": early[0, PROMPT:].to(torch.float32)}))
    prepared = [_text_sample(number, len(one.hidden["response"])) for number, one in enumerate(outputs)]
    return Rows(
        f"{model.config.model_type} on text, {len(head)} × {head.shape[1]}",
        "response",
        head,
        outputs[:calibration],
        outputs[calibration:],
        prepared[calibration:],
        exits[calibration:],
        head,
    )


def _text_sample(number: int, length: int) -> Prepared:
    """A sample in name only: fields read its key and its counts."""
    ids = torch.arange(length)
    flags = torch.ones(length, dtype=torch.bool)
    text = TextTokens(ids.to(torch.uint32), flags.to(torch.uint8), flags.to(torch.uint16), flags, ())
    empty = torch.zeros(0, dtype=torch.int64)
    return Prepared(f"{number:09d}-text", "text", ids, empty, ids, ids, ids, text, (), {})
