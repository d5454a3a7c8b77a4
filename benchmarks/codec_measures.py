"""What a coded distribution costs in nats and in degrees, against the distribution it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from student_train.distributions import DenseTeacher, Distribution, HeadAndTail, is_full
from student_train.losses.divergences import forward_kl, reverse_kl

CHUNK = 256
SOFT = 4.0
"""The temperature at which the forward divergence is measured besides."""
DIRECTIONS = {"forward": forward_kl, "reverse": reverse_kl}


@dataclass(frozen=True)
class Fixed:
    """A distribution given by its log-probs ``[R, V]``."""

    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Fixed:
        return Fixed(self.values[rows])

    def logits(self) -> torch.Tensor:
        return self.values

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        return self.values if temperature == 1.0 else torch.log_softmax(self.values / temperature, dim=1)


Make = Callable[[slice, torch.Tensor], Distribution]
"""(rows, their live log-probs) → the coded distribution of these rows."""


@dataclass
class Angles:
    """Gradients of one direction: every row's with respect to the student's logits, and their sum as a gradient of the head.

    Kept are the live gradients and what ours have besides: of the difference a small angle has all its digits.
    """

    rows: list[torch.Tensor] = field(default_factory=list)
    besides: torch.Tensor | None = None

    def add(self, ours: torch.Tensor, live: torch.Tensor, hidden: torch.Tensor) -> None:
        besides = ours - live
        self.rows.append(turned(besides, live, dim=1))
        summed = besides.T @ hidden
        self.besides = summed if self.besides is None else self.besides.add_(summed)

    def summary(self, name: str, live: torch.Tensor) -> dict[str, float]:
        """live: the sum ``[V, D_s]`` of the live gradients."""
        rows = torch.cat(self.rows)
        assert self.besides is not None
        return {
            f"{name}_angle": float(turned(self.besides.flatten(), live.flatten(), dim=0)),
            f"{name}_norm_ratio": float((live + self.besides).norm() / live.norm()),
            f"{name}_row_median": float(rows.median()),
            f"{name}_row_p95": float(rows.quantile(0.95)),
        }


def turned(besides: torch.Tensor, live: torch.Tensor, dim: int) -> torch.Tensor:
    """Degrees between ``live`` and ``live + besides`` along ``dim``."""
    along = (besides * live).sum(dim).double() / live.norm(dim=dim).double().clamp_min(1e-30)
    across = (besides.square().sum(dim).double() - along.square()).clamp_min(0).sqrt()
    return torch.rad2deg(torch.atan2(across, live.norm(dim=dim).double() + along)).float()


def degrees(dot: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(torch.arccos((dot.double() / (left.double() * right.double()).clamp_min(1e-30)).clamp(-1, 1)))


class Yardstick:
    """A live teacher and a student at the same rows, against which codings are measured one after the other.

    Kept are both sides' log-probs or logits and the live gradients: 16 bytes times V a row.
    """

    def __init__(self, live: DenseTeacher, hidden: torch.Tensor, head: torch.Tensor):
        """hidden ``[R, D_s]``, head ``[V, D_s]``: the student."""
        self._parts = [slice(start, start + CHUNK) for start in range(0, len(live), CHUNK)]
        self._truth = [live[rows].log_probs() for rows in self._parts]
        self._hidden = [hidden[rows] for rows in self._parts]
        self._student = [one @ head[: truth.shape[1]].T for one, truth in zip(self._hidden, self._truth)]
        self._live = {
            name: [gradient(divergence, Fixed(truth), student) for truth, student in zip(self._truth, self._student)]
            for name, divergence in DIRECTIONS.items()
        }
        self._sums = {
            name: sum((one.T @ own for one, own in zip(grads, self._hidden)), torch.zeros(()))
            for name, grads in self._live.items()
        }

    def entropy(self) -> float:
        """Nats a row of the live teacher."""
        return float(torch.cat([-(one.exp() * one).sum(dim=1) for one in self._truth]).mean())

    def measure(self, make: Make) -> dict[str, float]:
        """KL(p‖p̂) in nats, also at temperature ``SOFT``, and the angles of both directions' gradients."""
        angles = {name: Angles() for name in DIRECTIONS}
        kl, soft = [], []
        for number, rows in enumerate(self._parts):
            truth, student = self._truth[number], self._student[number]
            ours = make(rows, truth)
            kl.append(divergence_of(truth, dense_log_probs(ours, truth)))
            cool = torch.log_softmax(truth / SOFT, dim=1)
            soft.append(divergence_of(cool, dense_log_probs(ours, truth, SOFT)))
            for name, divergence in DIRECTIONS.items():
                if name == "reverse" and isinstance(ours, Fixed) and torch.isinf(ours.values).any():
                    continue  # samples say nothing of what was not drawn
                angles[name].add(gradient(divergence, ours, student), self._live[name][number], self._hidden[number])
        each = torch.cat(kl)
        result = {
            "kl": float(each.mean()),
            "kl_p95": float(each.quantile(0.95)),
            "soft_kl": float(torch.cat(soft).mean()),
        }
        for name, one in angles.items():
            result |= one.summary(name, self._sums[name]) if one.rows else {}
        return result

    def soft_mass(self, k: int) -> float:
        """Share of the mass that the ``k`` likeliest tokens hold at temperature ``SOFT``."""
        held = [torch.softmax(one / SOFT, dim=1).topk(k, dim=1).values.sum(dim=1) for one in self._truth]
        return float(torch.cat(held).mean())


def divergence_of(truth: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL ``[R]`` of log-probs ``[R, V]``."""
    return (truth.exp() * (truth - ours)).sum(dim=1)


def gradient(divergence: Callable[..., torch.Tensor], teacher: Distribution, student: torch.Tensor) -> torch.Tensor:
    leaf = student.detach().requires_grad_()
    (grad,) = torch.autograd.grad(divergence(teacher, leaf).sum(), leaf)
    return grad


def dense_log_probs(teacher: Distribution, truth: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Every token's log-prob; a top-k teacher's tail is spread evenly over the others."""
    if is_full(teacher):
        return teacher.log_probs(temperature)  # type: ignore[attr-defined]
    assert isinstance(teacher, HeadAndTail)
    topk = teacher.topk
    others = max(1, truth.shape[1] - topk.ids.shape[1])
    spread = (topk.log_tail - torch.log(torch.tensor(float(others))))[:, None].repeat(1, truth.shape[1])
    return Fixed(spread.scatter(1, topk.ids, topk.log_probs)).log_probs(temperature)
