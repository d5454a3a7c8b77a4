"""What fields want of hidden states and the head, whichever backend gave the states: heads with exact tails, samples, Gram matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import topk_rows
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.signal_records import TopK
from teacher_cache.teachers.sampling import sample_batch
from teacher_cache.wants import Wants

ONLY_LINEAR = (
    "the teacher caps its logits softly (at {cap:g}): hidden states are not read back as its logits, nor relations made of them; "
    "capture top-k or samples of it (--store compact, or --fields response_topk,vision_topk)"
)


class Signals:
    """Args: head: W ``[V, D]`` without padding rows, where the states are. cap: of a head that caps its logits softly."""

    def __init__(self, head: torch.Tensor, cap: float | None = None):
        self.head, self.cap = head, cap
        self._gram: torch.Tensor | None = None

    def __call__(
        self,
        rows: Mapping[str, torch.Tensor],
        counts: Mapping[str, Sequence[int]],
        prepared: Sequence[Prepared],
        wants: Wants,
    ) -> list[TeacherOutput]:
        """What is wanted of each sample, on the CPU.

        Args:
            rows: by kind, post-final-norm hidden states ``[R, D]`` of all samples one after the other; ``counts`` of them each.
        """
        heads = self._heads(rows, counts, wants)
        samples = sample_batch(rows, self.head, [one.key for one in prepared], counts, wants, self.cap)
        grams = self._grams(rows["vision"], counts["vision"]) if wants.gram else None
        by_kind = {name: rows[name].cpu().split(list(counts[name])) for name in wants.hidden}
        return [
            TeacherOutput(
                hidden={name: by_kind[name][i] for name in wants.hidden},
                topk={name: heads[name][i] for name in heads},
                gram=grams[i] if grams is not None else None,
                layout=one.layout,
                sampled={name: samples[name][i] for name in samples},
                device=self.head.device,
            )
            for i, one in enumerate(prepared)
        ]

    def _heads(
        self, rows: Mapping[str, torch.Tensor], counts: Mapping[str, Sequence[int]], wants: Wants
    ) -> dict[str, list[TopK]]:
        """Per row kind, the head of every sample."""
        result = {}
        for name, k in wants.topk.items():
            whole = topk_rows(rows[name], self.head, k, self.cap)
            columns = [column.cpu().split(list(counts[name])) for column in vars(whole).values()]
            result[name] = [TopK(*one) for one in zip(*columns)]
        return result

    def _grams(self, vision: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Y·Yᵀ = h·(WᵀW)·hᵀ: the head's Gram matrix [D, D] is made once, the vocabulary is never touched again."""
        if self.cap is not None:
            raise CompatibilityError(ONLY_LINEAR.format(cap=self.cap))
        if self._gram is None:
            head = self.head.to(torch.float32)
            self._gram = head.T @ head
        split = vision.to(torch.float32).split(list(counts))
        return [((one @ self._gram) @ one.T).cpu() for one in split]
