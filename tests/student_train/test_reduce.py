"""The chunked head product against its slow twin: all logits at once, plain autograd; values and both gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from student_train.distributions import DenseTeacher
from student_train.losses import reduce
from student_train.losses.counted import count_rows
from student_train.losses.divergences import cross_entropy, forward_kl
from student_train.losses.reduce import total_loss
from student_train.losses.relation import relation_cosine
from student_train.losses.terms import Rows, RowTerm, SampleTerm, StudentRows, Terms
from student_train.teacher_view import TeacherView
from tests.close import assert_all_close

VOCABULARY, PADDED, WIDTH, TEACHER_WIDTH = 29, 33, 6, 9
RESPONSE, VISION = (3, 0, 5, 4), (4, 4, 0, 8)


def kl(rows: Rows) -> torch.Tensor:
    return forward_kl(rows.need_teacher(), rows.logits)


TERMS: Terms = {
    "reg": RowTerm(1.0, "response", lambda rows: cross_entropy(rows.logits, rows.need_labels())),
    "res": RowTerm(0.7, "response", kl, sum_rows=True),
    "vis": RowTerm(1.3, "vision", kl, skip_first=1),
    "rel": SampleTerm(0.5, lambda s: relation_cosine(s.teacher_gram(), s.student_gram()), skip_first=1),
}


class Side:
    """One micro-batch with random rows; ``counts`` by kind."""

    def __init__(self, counts: Mapping[str, tuple[int, ...]], seed: int = 0, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.counts = counts
        self.head = (draw(PADDED, WIDTH) * scale).requires_grad_()
        self.hidden = {kind: (draw(sum(each), WIDTH) * scale).requires_grad_() for kind, each in counts.items()}
        self.labels = torch.randint(VOCABULARY, (sum(counts["response"]),), generator=generator)
        self.teacher_head = draw(VOCABULARY, TEACHER_WIDTH)
        self.teacher_hidden = {kind: draw(sum(each), TEACHER_WIDTH) for kind, each in counts.items()}

    def student(self, dtype: torch.dtype = torch.float32) -> StudentRows:
        hidden = {kind: one.to(dtype) for kind, one in self.hidden.items()}

        def gram(vocabulary: int | None) -> torch.Tensor:
            return self.head[:vocabulary].T @ self.head[:vocabulary]

        return StudentRows(hidden, self.counts, self.head, self.labels, gram)

    def view(self) -> TeacherView:
        logits = self.teacher_hidden["vision"] @ self.teacher_head.T
        return TeacherView(
            {kind: DenseTeacher(one, self.teacher_head) for kind, one in self.teacher_hidden.items()},
            [one @ one.T for one in logits.split(list(self.counts["vision"]))],
            VOCABULARY,
        )

    def leaves(self) -> list[torch.Tensor]:
        return [self.head, *self.hidden.values()]


def plain_loss(side: Side, denominators: Mapping[str, float]) -> torch.Tensor:
    """The twin of ``total_loss(TERMS, …)``, written out in float64 over whole logits."""
    head, labels = side.head.double(), side.labels
    logits = {kind: one.double() @ head.T for kind, one in side.hidden.items()}
    theirs = {kind: (one.double() @ side.teacher_head.double().T) for kind, one in side.teacher_hidden.items()}

    def divergence(kind: str) -> torch.Tensor:
        log_p, log_q = theirs[kind].log_softmax(1), logits[kind][:, :VOCABULARY].log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    vision = side.counts["vision"]
    keep = torch.tensor([i > 0 for count in vision for i in range(count)], dtype=torch.bool)
    sums = {
        "reg": -logits["response"].log_softmax(1)[torch.arange(len(labels)), labels].sum(),
        "res": divergence("response").sum(),
        "vis": divergence("vision")[keep].sum(),
        "rel": torch.zeros((), dtype=torch.float64),
    }
    for ours, teachers in zip(logits["vision"].split(list(vision)), theirs["vision"].split(list(vision))):
        if len(ours) > 1:
            grams = [(one[1:, :VOCABULARY] @ one[1:, :VOCABULARY].T).flatten() for one in (ours, teachers)]
            sums["rel"] = sums["rel"] + 1 - torch.nn.functional.cosine_similarity(*grams, dim=0)
    return sum(TERMS[name].weight * value / max(denominators[name], 1.0) for name, value in sums.items())


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found)]


def denominators_of(side: Side) -> dict[str, float]:
    return count_rows(side.counts, TERMS)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 1000])
@pytest.mark.parametrize("blocks", [1, 3])
def test_values_and_gradients_equal_plain_autograd(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, blocks: int
) -> None:
    monkeypatch.setattr(reduce, "CHUNK_BYTES", 4 * PADDED * chunk_rows)
    monkeypatch.setattr(reduce, "BLOCKS", blocks)
    side = Side({"response": RESPONSE, "vision": VISION})
    loss, shares = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    expected = plain_loss(side, denominators_of(side))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert sum(TERMS[name].weight * value for name, value in shares.items()) == pytest.approx(loss.item(), rel=1e-5)
    assert_all_close(gradients(loss, side.leaves()), gradients(expected, side.leaves()), 1e-5)


def test_saturated_rows_stay_finite_and_exact() -> None:
    side = Side({"response": RESPONSE, "vision": VISION}, scale=60.0)  # logits up to 1e4 and beyond
    assert (side.hidden["vision"] @ side.head.T).abs().max() > 1e4
    loss, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    expected = plain_loss(side, denominators_of(side))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(gradients(loss, side.leaves()), gradients(expected, side.leaves())):
        # float32 logits of size 1e4 are known to 1e-3, which moves a probability by as much
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def test_bfloat16_hidden_states_give_float32_logits() -> None:
    """Half precision enters through hidden states and head only: the loss is exact for the rounded ones."""
    side = Side({"response": RESPONSE, "vision": VISION})
    loss, _ = total_loss(TERMS, side.student(torch.bfloat16), side.view(), denominators_of(side))
    rounded = Side({"response": RESPONSE, "vision": VISION})
    rounded.head = side.head.detach().bfloat16().float()
    rounded.hidden = {kind: one.detach().bfloat16().float() for kind, one in side.hidden.items()}
    rows_only = {name: one for name, one in denominators_of(side).items()}
    expected = plain_loss(rounded, rows_only)
    # the relation keeps the float32 head: its small share is not rounded
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-4)
    whole = plain_loss(side, rows_only)
    for ours, theirs in zip(gradients(loss, side.leaves()), gradients(whole, side.leaves())):
        cosine = torch.nn.functional.cosine_similarity(ours.flatten().float(), theirs.flatten().float(), dim=0)
        assert cosine > 0.999
        assert ours.dtype == torch.float32


@pytest.mark.parametrize(
    "response, vision",
    [((3, 2), (0, 0)), ((0, 0), (4, 4)), ((0,), (0,)), ((2,), (1,)), ((2, 3), (1, 6))],
    ids=["text only", "no answers", "nothing", "one vision row, dropped", "one sample loses its only row"],
)
def test_empty_kinds(response: tuple[int, ...], vision: tuple[int, ...]) -> None:
    side = Side({"response": response, "vision": vision})
    loss, shares = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    expected = plain_loss(side, denominators_of(side))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert set(shares) == set(TERMS)
    if loss.requires_grad:
        assert_all_close(gradients(loss, side.leaves()), gradients(expected, side.leaves()), 1e-5)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen: str) -> None:
    side = Side({"response": RESPONSE, "vision": VISION})
    expected = gradients(plain_loss(side, denominators_of(side)), side.leaves())
    for leaf in [side.head] if frozen == "head" else side.hidden.values():
        leaf.requires_grad_(False)
    loss, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    trained = [(leaf, want) for leaf, want in zip(side.leaves(), expected) if leaf.requires_grad]
    found = torch.autograd.grad(loss, [leaf for leaf, _ in trained])
    assert_all_close(found, [theirs for _, theirs in trained], 1e-5)


def test_rows_without_any_gradient_still_have_a_value() -> None:
    """A text-only micro-batch of a stage that trains only the projector."""
    side = Side({"response": (3,), "vision": (0,)})
    for leaf in side.leaves():
        leaf.requires_grad_(False)
    loss, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), plain_loss(side, denominators_of(side)), rtol=1e-5, atol=1e-6)


def test_the_loss_scales_with_what_comes_after_it() -> None:
    side = Side({"response": RESPONSE, "vision": VISION})
    once, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    thrice, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    for one, three in zip(gradients(once, side.leaves()), gradients(3.0 * thrice, side.leaves())):
        torch.testing.assert_close(three, 3.0 * one)


def split(side: Side, samples: slice) -> Side:
    """Some samples of a micro-batch as their own one, sharing head and leaves."""
    part = Side({kind: each[samples] for kind, each in side.counts.items()})
    part.head, part.teacher_head = side.head, side.teacher_head
    begin = samples.start or 0
    rows = {
        kind: slice(sum(each[:begin]), sum(each[: samples.stop if samples.stop is not None else len(each)]))
        for kind, each in side.counts.items()
    }
    part.hidden = {kind: one[rows[kind]] for kind, one in side.hidden.items()}
    part.teacher_hidden = {kind: one[rows[kind]] for kind, one in side.teacher_hidden.items()}
    part.labels = side.labels[rows["response"]]
    return part


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_micro_batches_add_up(cut: int) -> None:
    """Denominators of the whole step make the sum over micro-batches the loss of the one big batch."""
    side = Side({"response": RESPONSE, "vision": VISION})
    whole, _ = total_loss(TERMS, side.student(), side.view(), denominators_of(side))
    parts = [split(side, slice(0, cut)), split(side, slice(cut, None))] if cut else [side]
    counted = [denominators_of(part) for part in parts]
    totals = {name: sum(one[name] for one in counted) for name in TERMS}
    assert totals == denominators_of(side)
    summed = sum(total_loss(TERMS, part.student(), part.view(), totals)[0] for part in parts)
    torch.testing.assert_close(summed, whole)
    assert_all_close(gradients(summed, side.leaves()), gradients(whole, side.leaves()), 1e-5)


def test_counting() -> None:
    side = Side({"response": RESPONSE, "vision": (4, 1, 0, 8)})
    # reg: rows; res: samples with an answer; vis: rows less the first of each; rel: samples with a row left
    assert denominators_of(side) == {"reg": 12.0, "res": 3.0, "vis": 10.0, "rel": 2.0}


@pytest.mark.parametrize("blocks, sizes", [(1, [3, 3, 3, 3, 3, 1]), (2, [2, 1] * 5 + [1])], ids=["whole", "in two"])
def test_a_chunk_is_never_larger_than_asked(monkeypatch: pytest.MonkeyPatch, blocks: int, sizes: list[int]) -> None:
    monkeypatch.setattr(reduce, "CHUNK_BYTES", 4 * PADDED * 3)
    monkeypatch.setattr(reduce, "BLOCKS", blocks)
    seen: list[int] = []

    def spy(inner: Callable[[Rows], torch.Tensor]) -> Callable[[Rows], torch.Tensor]:
        def loss(rows: Rows) -> torch.Tensor:
            seen.append(len(rows.logits))
            assert rows.logits.dtype == torch.float32
            return inner(rows)

        return loss

    side = Side({"response": RESPONSE, "vision": VISION})
    term = RowTerm(1.0, "vision", spy(kl))
    total_loss({"vis": term}, side.student(torch.bfloat16), side.view(), {"vis": 16.0})
    assert seen == sizes
