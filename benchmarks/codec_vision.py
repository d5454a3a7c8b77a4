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
from teacher_cache.records import Sketch, TeacherOutput, TopK

SAMPLES = 24
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
        cached = HeadAndSketch(
            TopK.join([coded.records["topk"][number]]), Sketch.join([coded.records["hidden"][number]]), coded.low_rank
        )
        for name, value in one_sample(rows, rows.test[number], students[number], cached).items():
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


def one_sample(rows: Rows, said: TeacherOutput, student: torch.Tensor, cached: HeadAndSketch) -> dict[str, float]:
    """Student rows ``[N, D_s]`` on the teacher's grid."""
    hidden = said.hidden["vision"].to(torch.float32)
    live = DenseTeacher(hidden, rows.head)
    logits = live.logits()
    student_logits = student @ rows.student_head[: len(rows.head)].T
    gram = student_logits @ student_logits.T
    truth = relation_cosine(logits @ logits.T, gram)
    ours = relation_cosine(cached.head.gram(cached.sketch), gram)
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
