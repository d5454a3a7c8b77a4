"""How much memory do the losses take beside a chunked cross-entropy alone, at a real vocabulary?

The losses of one micro-batch (``total_loss``, forward and backward) on given hidden states, no model: what grows is logits, teacher's
log-probs, gradients and temporaries. Every variant runs in a process of its own: once small to load what the first call loads, then
its peak is taken from there. A plain cross-entropy over whole logits stands beside them for the scale.

    python -m benchmarks.loss_memory [--rows 1000] [--vocabulary 151936] [--save]

Target: at most 1.3 × the chunked cross-entropy, of the same rows on the same machine, in the same run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import memory
from benchmarks.common import argument_parser, finish, machine, print_table
from student_train.distributions import DenseTeacher, Distribution, HeadAndSketch, HeadAndTail, SketchTeacher
from student_train.losses import divergences
from student_train.losses.reduce import total_loss
from student_train.losses.terms import RowTerm, StudentRows, Terms
from student_train.teacher_view import TeacherView
from teacher_cache.models.head import topk_rows
from teacher_cache.models.low_rank import LowRankHead
from teacher_cache.signal_records import Sketch

CROSS_ENTROPY, WHOLE = "cross-entropy", "cross-entropy, whole logits"
DIVERGENCES = {"forward KL": "forward_kl", "reverse KL": "reverse_kl", "JSD": "jensen_shannon"}
TEACHERS = ("dense", "sketch", "top-k + sketch", "top-k")
PADDING = 290
"""Rows of the student's head beyond the teacher's vocabulary, as Qwen2 has them."""
TOP_K = 50
TARGET = 1.3


def variants() -> list[str]:
    return [WHOLE, CROSS_ENTROPY, *(f"{divergence}, {teacher}" for divergence in DIVERGENCES for teacher in TEACHERS)]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=1000, help="response rows of the micro-batch")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="rows of the student's head")
    parser.add_argument(
        "--width", type=int, default=64, help="hidden size of both sides: small, so that logits are what counts"
    )
    parser.add_argument("--variants", nargs="*", choices=variants(), help="only these")
    parser.add_argument("--memory-of", choices=variants(), help="internal: peak memory of one variant")
    return parser.parse_args(arguments)


def teacher_of(name: str, rows: int, vocabulary: int, width: int, device: str) -> Distribution:
    """Random rows of a teacher in the form that a field gives."""
    head = torch.randn(vocabulary, width, device=device)
    hidden = torch.randn(rows, width, device=device)
    if name == "dense":
        return DenseTeacher(hidden, head)
    topk = topk_rows(hidden, head, TOP_K)
    if name == "top-k":
        return HeadAndTail(topk, vocabulary)
    sketch, low_rank = Sketch(hidden, hidden.new_zeros(rows)), LowRankHead(head, head.new_zeros(vocabulary))
    return HeadAndSketch(topk, sketch, low_rank) if name == "top-k + sketch" else SketchTeacher(sketch, low_rank)


def make_step(variant: str, rows: int, options: Any) -> Callable[[], None]:
    """Loss and gradients of one micro-batch, as a method on response tokens takes them: cross-entropy beside one divergence."""
    torch.manual_seed(0)
    device, vocabulary = options.device, options.vocabulary
    head = torch.randn(vocabulary, options.width, device=device, requires_grad=True)
    hidden = torch.randn(rows, options.width, device=device, requires_grad=True)
    labels = torch.randint(vocabulary - PADDING, (rows,), device=device)
    terms: dict[str, RowTerm] = {
        "reg": RowTerm(1.0, "response", lambda part: divergences.cross_entropy(part.logits, part.need_labels()))
    }
    teacher = None
    if variant not in (CROSS_ENTROPY, WHOLE):
        divergence, form = variant.split(", ", 1)
        loss = getattr(divergences, DIVERGENCES[divergence])
        terms["res"] = RowTerm(1.0, "response", lambda part: loss(part.need_teacher(), part.logits))
        teacher = teacher_of(form, rows, vocabulary - PADDING, options.width, device)
    run = _whole if variant == WHOLE else partial(_chunked, terms, teacher)
    return lambda: run(head, hidden, labels)


def _chunked(
    terms: Terms, teacher: Distribution | None, head: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor
) -> None:
    student = StudentRows({"response": hidden}, {"response": (len(hidden),)}, head, labels, lambda columns: head)
    view = TeacherView({"response": teacher} if teacher is not None else {})
    loss, _ = total_loss(terms, student, view, dict.fromkeys(terms, float(len(hidden))))
    loss.backward()
    head.grad = hidden.grad = None


def _whole(head: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    torch.nn.functional.cross_entropy(hidden @ head.T, labels).backward()
    head.grad = hidden.grad = None


def peak_memory(options: Any) -> dict[str, Any]:
    """MiB above what lies there before, and seconds of that step."""
    make_step(options.memory_of, 2, options)()  # the first call of everything loads libraries and starts threads
    step = make_step(options.memory_of, options.rows, options)
    gc.collect()
    before, peak, seconds = memory.peak_memory(step, options.device)
    return {"mib": round(peak - before), "seconds": round(seconds, 3)}


def of_variant(variant: str, options: Any) -> dict[str, Any]:
    sizes = [word for name in ("rows", "vocabulary", "width") for word in (f"--{name}", str(getattr(options, name)))]
    return memory.in_subprocess("benchmarks.loss_memory", ["--memory-of", variant, "--device", options.device, *sizes])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory_of:
        print(json.dumps(peak_memory(options)))
        return
    chosen = options.variants or variants()
    found = {name: of_variant(name, options) for name in dict.fromkeys([CROSS_ENTROPY, *chosen])}
    for one in found.values():
        one["of cross-entropy"] = round(one["mib"] / max(1, found[CROSS_ENTROPY]["mib"]), 3)
    chunked = [one["of cross-entropy"] for name, one in found.items() if name not in (WHOLE, CROSS_ENTROPY)]
    body = {
        "machine": machine(options.device),
        "shapes": f"{options.rows} rows x {options.vocabulary}",
        "width": options.width,
        "logits_mib": round(options.rows * options.vocabulary * 4 / 2**20),
        "variants": found,
        "worst": max(chunked, default=None),
        "median": median(chunked) if chunked else None,
        "target": TARGET,
    }
    print_table(
        ("losses", "MiB", "of cross-entropy", "seconds"),
        [(name, one["mib"], one["of cross-entropy"], one["seconds"]) for name, one in found.items()],
    )
    print(f"whole logits alone: {body['logits_mib']} MiB; target: at most {TARGET} × the chunked cross-entropy")
    finish("loss_memory", body, options.save)


if __name__ == "__main__":
    main()
