"""Vision losses from the ``standard`` profile against the live teacher: RDist, VTM, VSD, VLAD (methods.md), sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.codec_measures import degrees, gradient
from benchmarks.codec_rows import Rows
from benchmarks.common import print_table
from student_train.distributions import DenseTeacher, HeadAndSketch
from student_train.losses.affinity import affinity_loss, cosine_affinity
from student_train.losses.divergences import reverse_kl
from student_train.losses.matching import manhattan_cost, match
from student_train.losses.relation import relation_cosine
from teacher_cache.codecs import container
from teacher_cache.fields import create_field
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import Sketch

SAMPLES = 24
PICTURES, ANSWERS = 4, 14
"""Samples whose vision tokens and whose answers make a record of about 576 and 187 tokens."""
POOL = 2
"""The student's grid is pooled 2 × 2, as EM-KD's: a quarter of the teacher's vision tokens."""


def vision_terms(rows: Rows, coded: Any) -> dict[str, Any]:
    """Relative errors of the losses, cost of the cached assignment over the optimum, and VSD's gradient angle (medians and worst)."""
    affinity: Any = create_field("affinity", {"layout": "factored"})
    affinity = affinity.with_calibration(affinity.fit(rows.calibration, rows.head).tensors)
    counts = [len(one.hidden["vision"]) for one in rows.test]
    students = rows.student_hidden.split(counts)
    chosen = [number for number, count in enumerate(counts) if count and count % 144 == 0][:SAMPLES]
    lines: dict[str, list[float]] = {}
    for number in chosen:
        stored: Sketch = coded.records["hidden"][number]
        cached = HeadAndSketch.of(coded.records["topk"][number], stored, coded.low_rank)
        for name, value in one_sample(rows, rows.test[number], students[number], cached, stored).items():
            lines.setdefault(name, []).append(value)
        stored = container.unpack(container.pack(affinity.encode(rows.prepared[number], rows.test[number])))
        kept = rows.prepared[number].text.response
        value = affinity_error(rows.test[number], affinity.decode(stored), rows.student[number], kept)
        lines.setdefault("VLAD relative error", []).append(value)
    table = {name: torch.tensor(values) for name, values in lines.items()}
    print(f"\nvision terms from standard, {len(chosen)} samples")
    print_table(
        ["", "median", "worst"], [[n, f"{float(v.median()):.5f}", f"{float(v.max()):.5f}"] for n, v in table.items()]
    )
    return {name: {"median": float(v.median()), "worst": float(v.max())} for name, v in table.items()}


def one_sample(
    rows: Rows, said: TeacherOutput, student: torch.Tensor, cached: HeadAndSketch, stored: Sketch
) -> dict[str, float]:
    """Student rows ``[N, D_s]`` on the teacher's grid. stored: the sketch that relations are made from."""
    hidden = said.hidden["vision"].to(torch.float32)
    live = DenseTeacher(hidden, rows.head)
    logits = live.logits()
    student_logits = student @ rows.student_head[: len(rows.head)].T
    gram = student_logits @ student_logits.T
    truth = relation_cosine(logits @ logits.T, gram)
    ours = relation_cosine(cached.head.gram(stored), gram)
    side = round(len(hidden) ** 0.5)
    grid = student.T.reshape(1, -1, side, side)
    pooled = F.adaptive_avg_pool2d(grid, side // POOL).flatten(2)[0].T
    cost = manhattan_cost(live, pooled, rows.student_head)
    best, found = match(cost), match(manhattan_cost(cached, pooled, rows.student_head))
    columns = torch.arange(len(best))
    pooled_logits = pooled @ rows.student_head[: len(rows.head)].T
    grads = [
        gradient(reverse_kl, one[matched], pooled_logits)
        for one, matched in ((live, best), (cached, best), (cached, found))
    ]
    flat = [one.double().flatten() for one in grads]
    angle = [float(degrees(flat[0] @ one, flat[0].norm(), one.norm())) for one in flat[1:]]
    return {
        "RDist relative error": float((ours - truth).abs() / truth),
        "VTM cost over optimum": float(cost[found, columns].sum() / cost[best, columns].sum()),
        "VTM pairs that differ": float((best != found).float().mean()),
        "VSD angle, same pairs, degrees": angle[0],
        "VSD angle, own pairs, degrees": angle[1],
    }


def affinity_error(said: TeacherOutput, cosine: torch.Tensor, student: TeacherOutput, kept: torch.Tensor) -> float:
    """Relative error of VLAD over the text tokens ``kept`` (bool ``[N]``), row by row on the same grid."""
    truth = cosine_affinity(said.hidden["vision"], said.hidden["text"])
    ours = cosine_affinity(student.hidden["vision"], student.hidden["text"][kept])
    same = torch.arange(len(ours))
    values = [float(affinity_loss(one, ours, same, kept)) for one in (truth, cosine)]
    return abs(values[1] - values[0]) / values[0]


def long_answers(rows: Rows) -> dict[str, Any]:
    """Affinities of records as long as real ones: four images and ``ANSWERS`` answers together; bytes a record, and VLAD's error.

    Columns: the field as it is, and with one step for all records.
    """
    lines: dict[str, Any] = {}
    for name, params in (("as stored", {}), ("step 0.02", {"step": 0.02}), ("step 0.03", {"step": 0.03})):
        field: Any = create_field("affinity", {"layout": "factored", "text": "all", **params})
        field = field.with_calibration(field.fit(rows.calibration, rows.head).tensors)
        sizes, errors = [], []
        for said, student in joined_records(rows):
            data = container.pack(field.encode(None, said))
            kept = torch.ones(len(said.hidden["text"]), dtype=torch.bool)
            sizes.append(len(data))
            errors.append(affinity_error(said, field.decode(container.unpack(data)), student, kept))
        value = torch.tensor(errors)
        tokens = [len(one.hidden["text"]) for one, _ in joined_records(rows)]
        lines[name] = {
            "bytes": float(torch.tensor(sizes, dtype=torch.float32).median()),
            "VLAD median": float(value.median()),
            "VLAD worst": float(value.max()),
            "records": len(sizes),
            "text tokens": [min(tokens), max(tokens)],
        }
    print("\naffinities of long records")
    header = ["", "bytes", "VLAD median", "VLAD worst"]
    print_table(header, [[name, *(f"{one[key]:.5g}" for key in header[1:])] for name, one in lines.items()])
    return lines


def joined_records(rows: Rows) -> list[tuple[TeacherOutput, TeacherOutput]]:
    """(teacher, student) on the same rows: ``PICTURES`` images and the response tokens of ``ANSWERS`` samples a record."""
    whole = [number for number, one in enumerate(rows.test) if one.layout and len(one.hidden["vision"]) % 144 == 0]
    found = []
    for start in range(0, len(whole) - ANSWERS + 1, ANSWERS):
        these = whole[start : start + ANSWERS]
        both = []
        for said in (rows.test, rows.student):
            answers = [said[n].hidden["text"][rows.prepared[n].text.response] for n in these]
            pictures = torch.cat([said[n].hidden["vision"] for n in these[:PICTURES]])
            layout = tuple(image for n in these[:PICTURES] for image in rows.test[n].layout)
            both.append(TeacherOutput({"vision": pictures, "text": torch.cat(answers)}, layout=layout))
        found.append((both[0], both[1]))
    return found
