"""EM-KD's vision token matching and distillation of matched rows (VTM and VSD, arXiv 2511.21106).

N_t teacher rows and N_s student rows of one image (or view); the student has fewer, since its vision tokens are compressed. Matching
depends on the student of the moment: it is computed every step, without gradient, and never cached.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from student_train.distributions import Distribution, FullVocabulary
from student_train.losses.distances import manhattan
from student_train.losses.divergences import reverse_kl
from teacher_cache.errors import KdcliError
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits

UNMATCHED = -1
SPACES = ("logits", "probs")


def check_space(space: str) -> None:
    """KdcliError where there is no such cost."""
    if space not in SPACES:
        raise KdcliError(f"matching cost on {space!r}: choose from {', '.join(SPACES)}")


@torch.no_grad()
def manhattan_cost(
    teacher: FullVocabulary,
    hidden: torch.Tensor,
    head: torch.Tensor,
    space: str = "logits",
    cap: float | None = None,
) -> torch.Tensor:
    """C[i, j] = Σ_v |z_t[i, v] − z_s[j, v]|, float64 ``[N_t, N_s]``, over the vocabulary that both sides have.

    Logits exist for a chunk of rows of either side at a time, their maxima for a few pairs; the teacher's are made once unless the
    student's rows do not fit one chunk. No gradient.

    Args:
        teacher: raw vision logits, ``[N_t, V_t]`` when asked for.
        hidden: ``[N_s, D]`` of the student, head: ``[V_s, D]``; z_s = hidden · headᵀ, capped softly where ``cap`` is given.
        space: ``logits`` (raw, as in the paper) or ``probs`` (softmax of both).
    """
    check_space(space)
    cost = torch.zeros(len(teacher), len(hidden), dtype=torch.float64, device=hidden.device)
    weight, rows = head.to(hidden.dtype), chunk_rows(head, CHUNK_BYTES)
    for j in range(0, len(hidden), rows):
        ours = head_logits(hidden[j : j + rows], weight, cap)
        for i in range(0, len(teacher), rows):
            theirs = teacher[i : i + rows].logits()
            width = min(theirs.shape[1], ours.shape[1])
            pair = (theirs[:, :width], ours[:, :width])
            if space == "probs":
                pair = (pair[0].softmax(1), pair[1].softmax(1))
            cost[i : i + rows, j : j + rows] = manhattan(*pair)
    return cost


@torch.no_grad()
def hidden_cost(teacher: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    """C[i, j] = Σ_d |h_t[i, d] − h_s[j, d]|, float64 ``[N_t, N_s]``: the paper's ablation that matches on hidden states.

    Args:
        teacher: ``[N_t, D_t]``. mapped: the student's hidden states in the teacher's width ``[N_s, D_t]``; the map learns nothing here.
    """
    return manhattan(teacher.to(torch.float32), mapped.detach().to(torch.float32))


def match(cost: torch.Tensor) -> torch.Tensor:
    """The assignment of least total cost: int64 ``[N_s]``, the teacher row of every student row, no teacher row twice.

    Exact (``scipy.optimize.linear_sum_assignment``, on the CPU). Where the student has more rows than the teacher, N_s − N_t of them
    stay without one: ``UNMATCHED`` (−1).

    Args:
        cost: ``[N_t, N_s]``.
    """
    given, cost = cost.device, cost.cpu()
    if not torch.isfinite(cost).all():
        raise KdcliError(
            "the matching cost is not finite: the student's or the teacher's vision logits hold NaN or infinity"
        )
    teachers, students = linear_sum_assignment(cost.numpy())
    matched = torch.full((cost.shape[1],), UNMATCHED, dtype=torch.int64)
    matched[torch.from_numpy(students)] = torch.from_numpy(teachers)
    return matched.to(given)


def matched_reverse_kl(
    teacher: Distribution, student_logits: torch.Tensor, matched: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """VSD: KL(p_s ‖ p_t of the matched row) ``[N_s]``; 0 for unmatched rows, which a mean should not count.

    Args:
        teacher: rows ``[N_t]``. student_logits: ``[N_s, V]``. matched: ``[N_s]`` of ``match``.
    """
    values = reverse_kl(teacher[matched.clamp_min(0)], student_logits, temperature)
    return torch.where(matched == UNMATCHED, 0.0, values)
