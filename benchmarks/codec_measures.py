"""What a coded distribution costs in nats and in degrees, against the distribution it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from student_train.distributions import DenseTeacher, Distribution, HeadAndTail, is_full
from student_train.losses.divergences import forward_kl, reverse_kl

CHUNK = 256
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


@dataclass
class Angles:
    """Gradients of one direction: every row's with respect to the student's logits, and their sum as a gradient of the head."""

    rows: list[torch.Tensor] = field(default_factory=list)
    ours: torch.Tensor | None = None
    live: torch.Tensor | None = None

    def add(self, ours: torch.Tensor, live: torch.Tensor, hidden: torch.Tensor) -> None:
        ours, live, hidden = ours.double(), live.double(), hidden.double()  # a cosine near 1 has no digit to lose
        self.rows.append(degrees((ours * live).sum(1), ours.norm(dim=1), live.norm(dim=1)))
        mine, theirs = (one.T @ hidden for one in (ours, live))
        self.ours = mine if self.ours is None else self.ours.add_(mine)
        self.live = theirs if self.live is None else self.live.add_(theirs)

    def summary(self, name: str) -> dict[str, float]:
        rows = torch.cat(self.rows)
        assert self.ours is not None and self.live is not None
        whole = degrees((self.ours * self.live).sum(), self.ours.norm(), self.live.norm())
        return {
            f"{name}_angle": float(whole),
            f"{name}_norm_ratio": float(self.ours.norm() / self.live.norm()),
            f"{name}_row_median": float(rows.median()),
            f"{name}_row_p95": float(rows.quantile(0.95)),
        }


def degrees(dot: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(torch.arccos((dot.double() / (left.double() * right.double()).clamp_min(1e-30)).clamp(-1, 1)))


def measure(
    live: DenseTeacher,
    coded: Distribution | None,
    hidden: torch.Tensor,
    head: torch.Tensor,
    make: Callable[[slice, torch.Tensor], Distribution] | None = None,
) -> dict[str, float]:
    """KL(p‖p̂) in nats, and the angles of both directions' gradients between the live teacher and its coded form.

    Args:
        hidden ``[R, D_s]``, head ``[V, D_s]``: the student. make: (rows, live log-probs) → distribution of these rows, instead of
            ``coded``.
    """
    angles = {name: Angles() for name in DIRECTIONS}
    kl = []
    for start in range(0, len(live), CHUNK):
        rows = slice(start, start + CHUNK)
        truth = live[rows].log_probs()
        ours = make(rows, truth) if make is not None else coded[rows]  # type: ignore[index]
        student = hidden[rows] @ head[: truth.shape[1]].T
        kl.append((truth.exp() * (truth - dense_log_probs(ours, truth))).sum(dim=1))
        for name, divergence in DIRECTIONS.items():
            if name == "reverse" and isinstance(ours, Fixed) and torch.isinf(ours.values).any():
                continue  # samples say nothing of what was not drawn
            grads = [gradient(divergence, teacher, student) for teacher in (ours, Fixed(truth))]
            angles[name].add(*grads, hidden[rows])
    result = {"kl": float(torch.cat(kl).mean()), "kl_p95": float(torch.cat(kl).quantile(0.95))}
    for name, one in angles.items():
        result |= one.summary(name) if one.rows else {}
    return result


def gradient(divergence: Callable[..., torch.Tensor], teacher: Distribution, student: torch.Tensor) -> torch.Tensor:
    leaf = student.detach().requires_grad_()
    (grad,) = torch.autograd.grad(divergence(teacher, leaf).sum(), leaf)
    return grad


def dense_log_probs(teacher: Distribution, truth: torch.Tensor) -> torch.Tensor:
    """Every token's log-prob; a top-k teacher's tail is spread evenly over the others."""
    if is_full(teacher):
        return teacher.log_probs()  # type: ignore[attr-defined]
    assert isinstance(teacher, HeadAndTail)
    topk = teacher.topk
    others = max(1, truth.shape[1] - topk.ids.shape[1])
    spread = (topk.log_tail - torch.log(torch.tensor(float(others))))[:, None].repeat(1, truth.shape[1])
    return spread.scatter(1, topk.ids, topk.log_probs)
