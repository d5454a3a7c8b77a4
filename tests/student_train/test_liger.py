"""Liger-Kernel's fused cross-entropy: refused by name where it cannot run, equal to ours where it can (CUDA)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from student_train.losses import liger, reduce
from student_train.losses.liger import check_liger
from student_train.losses.reduce import total_loss
from student_train.losses.terms import RowTerm, StudentRows, Terms, label_loss
from student_train.teacher_view import TeacherView
from teacher_cache.errors import KdcliError

ROWS, VOCABULARY, WIDTH = 70, 1000, 32
CROSS_ENTROPY: Terms = {"reg": RowTerm(0.5, "response", label_loss)}


def student(device: str = "cpu", dtype: torch.dtype = torch.float32, cap: float | None = None) -> StudentRows:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, WIDTH, generator=generator).to(device) for n in (ROWS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator).to(device)
    hidden, head = hidden.to(dtype).requires_grad_(), head.requires_grad_()
    return StudentRows({"response": hidden}, {"response": (ROWS,)}, head, labels, lambda columns: head, cap=cap)


def summed(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, cap: float | None) -> torch.Tensor:
    """What the kernel promises, in plain torch."""
    logits = hidden @ head.T if cap is None else cap * torch.tanh(hidden @ head.T / cap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def test_without_cuda_or_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdcliError, match="needs a CUDA device, this run is on cpu"):
        check_liger(torch.device("cpu"))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(KdcliError, match=r"kdcli\[liger\]"):
        check_liger(torch.device("cuda"))


@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_stage_of_cross_entropy_takes_it(monkeypatch: pytest.MonkeyPatch, cap: float | None) -> None:
    """Weights, denominators and shares are those of our own chunks."""
    monkeypatch.setattr(reduce, "fused_cross_entropy", summed)
    found = []
    for fused in (False, True):
        side = student(cap=cap)
        loss, shares = total_loss(CROSS_ENTROPY, side, TeacherView({}), {"reg": 90.0}, use_liger_kernel=fused)
        loss.backward()
        found.append((loss.detach(), shares["reg"], side.hidden["response"].grad, side.head.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "terms",
    [
        {**CROSS_ENTROPY, "res": RowTerm(1.0, "response", label_loss)},
        {"reg": RowTerm(1.0, "response", lambda rows: label_loss(rows) * 2)},
        {"reg": RowTerm(1.0, "response", label_loss, skip_first=1)},
    ],
    ids=["two terms", "another loss", "not all rows"],
)
def test_anything_else_does_not(monkeypatch: pytest.MonkeyPatch, terms: Terms) -> None:
    monkeypatch.setattr(reduce, "fused_cross_entropy", lambda *arguments: pytest.fail("not a plain cross-entropy"))
    loss, _ = total_loss(terms, student(), TeacherView({}), dict.fromkeys(terms, 1.0), use_liger_kernel=True)
    assert torch.isfinite(loss)


@pytest.mark.skipif(
    not torch.cuda.is_available() or not find_spec("liger_kernel"), reason="needs CUDA and kdcli[liger]"
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_it_is_our_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    values = []
    for fused in (False, True):
        side = student("cuda", dtype)
        loss, _ = total_loss(CROSS_ENTROPY, side, TeacherView({}), {"reg": 90.0}, use_liger_kernel=fused)
        loss.backward()
        values.append((loss.detach(), side.hidden["response"].grad.float(), side.head.grad))
    for ours, theirs in zip(*values):
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance * float(ours.abs().max()))
