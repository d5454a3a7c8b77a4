"""Matching costs of many groups of rows at once: few wide head products in place of one a group (slow twins: ``losses.matching``).

A group's own product has some hundred rows, too few for a matrix product to be fast; groups therefore go through the heads in packs,
as many one after the other as a chunk of logits has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from student_train.distributions import FullVocabulary
from student_train.losses.column_sampling import sampler_of_head
from student_train.losses.distances import manhattan
from student_train.losses.matching import check_space, manhattan_cost
from student_train.match_groups import MatchGroup
from teacher_cache.models.head import CHUNK_BYTES, chunk_rows, head_logits

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Row numbers int64 ``[N]`` → float32 ``[N, V]``, the caller's to overwrite."""


@torch.no_grad()
def manhattan_costs(
    teacher: FullVocabulary,
    hidden: torch.Tensor,
    head: torch.Tensor,
    groups: Sequence[MatchGroup],
    space: str,
    cap: float | None = None,
) -> Iterator[torch.Tensor]:
    """``manhattan_cost`` of every group, float64 ``[G_t, G_s]``, on the hidden states' device.

    Args:
        teacher: raw vision logits of all rows that groups name. hidden: ``[R_s, D]`` of the student, head: ``[V_s, D]``, cap: its own.
    """
    check_space(space)
    weight, room = head.to(hidden.dtype), chunk_rows(head, CHUNK_BYTES)
    width = min(teacher.vocabulary, len(head))

    def values(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :width].softmax(1) if space == "probs" else logits[:, :width]

    for pack in packs(groups, room):
        if len(pack[0].teacher) > room:  # alone, and in chunks of its own
            rows = (one.to(hidden.device) for one in (pack[0].teacher, pack[0].student))
            yield manhattan_cost(teacher[next(rows)], hidden[next(rows)], head, space, cap)
            continue
        yield from _costs_of_pack(
            pack,
            lambda rows: values(teacher[rows].logits()),
            lambda rows: values(head_logits(hidden[rows], weight, cap)),
            hidden.device,
        )


@torch.no_grad()
def column_sampled_costs(
    teacher: FullVocabulary,
    hidden: torch.Tensor,
    head: torch.Tensor,
    groups: Sequence[MatchGroup],
    columns: int,
    generator: torch.Generator,
    cap: float | None = None,
) -> Iterator[torch.Tensor]:
    """An unbiased estimate of every group's ``manhattan_cost`` from ``columns`` columns of the vocabulary, float64 ``[G_t, G_s]``.

    Only these columns' logits are made, of both sides: the two whole head products, which cost as much as the distances, are not.
    Columns that tell the teacher's rows apart are drawn more often (``column_spread``) and weigh less: on the demo's teacher a
    thousand of them do what several thousand uniform ones do. As many columns as there are give the exact cost.

    All groups share ONE draw, a function of the generator's state (of the CPU). Each group's estimate is as unbiased as with a draw
    of its own; the errors of different groups are no longer independent, which no assignment sees, since none looks at two groups.
    """
    vocabulary = min(teacher.vocabulary, len(head))
    sampler = sampler_of_head(teacher.head_rows, vocabulary, columns)
    chosen, weights = (one.to(head.device) for one in sampler.draw(generator))
    weight = head[chosen].to(hidden.dtype)
    for pack in packs(groups, chunk_rows(weight, CHUNK_BYTES)):
        yield from _costs_of_pack(
            pack,
            lambda rows: teacher[rows].logits_at(chosen).mul_(weights),
            lambda rows: head_logits(hidden[rows], weight, cap).mul_(weights),
            hidden.device,
        )


def packs(groups: Sequence[MatchGroup], room: int) -> Iterator[list[MatchGroup]]:
    """Groups one after the other, as many as have at most ``room`` rows of either side together; a larger one is a pack alone."""
    pack: list[MatchGroup] = []
    rows = 0
    for group in groups:
        more = max(len(group.teacher), len(group.student))
        if pack and rows + more > room:
            yield pack
            pack, rows = [], 0
        pack, rows = [*pack, group], rows + more
    if pack:
        yield pack


def _costs_of_pack(
    pack: Sequence[MatchGroup], theirs: Logits, ours: Logits, device: torch.device
) -> Iterator[torch.Tensor]:
    """One product of either side, then the distances inside each group."""
    left = theirs(torch.cat([group.teacher for group in pack]).to(device))
    right = ours(torch.cat([group.student for group in pack]).to(device))
    of_groups = (left.split([len(g.teacher) for g in pack]), right.split([len(g.student) for g in pack]))
    for teacher, student in zip(*of_groups):
        yield manhattan(teacher, student)
