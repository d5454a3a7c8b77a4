"""Which rows count: weights by every source, the step they give against the live teacher in float64, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from student_train.distributions import DenseTeacher, HeadAndTail, likeliest
from student_train.losses.counted import TermWeights, count_rows
from student_train.losses.terms import RowTerm, SampleTerm, label_loss
from student_train.needs import serve
from student_train.sample_columns import answer_lengths
from student_train.selection import Tokens, check_columns, needs_of, parse_selector
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import TextTokens
from tests.contracts.dense_reference import in_float64, live_view, load64, reference, teacher_batch
from tests.contracts.test_methods import loss_and_gradients

TOKENS = Tokens(
    labels=torch.tensor([3, 5, 7, 7, 1]),
    likeliest=torch.tensor([3, 6, 7, 2, 1]),
    probability=torch.tensor([0.9, 0.8, 0.4, 0.3, 0.6]),
)
COUNTS = (2, 0, 3)


@pytest.mark.parametrize(
    ("text", "tokens", "samples"),
    [
        ("confidence", [0.9, 0.8, 0.4, 0.3, 0.6], [0.85, 1, 1.3 / 3]),
        ("confidence:0.6", [1, 1, 0, 0, 1], [1, 1, 1 / 3]),
        ("agreement", [1, 0, 1, 0, 1], [0.5, 1, 2 / 3]),
        ("unless-contradicted:0.5", [1, 0, 1, 1, 1], [0.5, 1, 1]),
        ("confidence/mean", [0.85, 0.85, 1.3 / 3, 1.3 / 3, 1.3 / 3], [0.85, 1, 1.3 / 3]),
        ("unless-contradicted:0.5/least", [0, 0, 1, 1, 1], [0, 1, 1]),
        ("column:quality", [2, 2, 0.5, 0.5, 0.5], [2, 0, 0.5]),
    ],
)
def test_sources(text: str, tokens: list[float], samples: list[float]) -> None:
    batch: Any = SimpleNamespace(
        batch=SimpleNamespace(counts={"response": COUNTS}), columns={"column:quality": (2.0, 0.0, 0.5)}
    )
    found = parse_selector("reg", text).weights(batch, TOKENS, torch.device("cpu"))
    assert found.tokens.tolist() == pytest.approx(tokens) and found.samples.tolist() == pytest.approx(samples)


def text_of(*answers: int) -> TextTokens:
    """Answers of so many tokens, each behind a question of one."""
    turns = [turn for number, count in enumerate(answers) for turn in [2 * number, *[2 * number + 1] * count]]
    columns = (torch.zeros(len(turns), dtype=torch.uint32), torch.zeros(len(turns), dtype=torch.uint8))
    turn = torch.tensor(turns, dtype=torch.uint16)
    return TextTokens(*columns, turn, torch.tensor([one % 2 == 1 for one in turns], dtype=torch.bool), ())


@pytest.mark.parametrize(
    ("whole", "tokens", "samples"),
    [
        ("", [1, 0, 0, 0.5, 0.5], [1 / 3, 0.5, 1]),
        ("/mean", [1 / 3, 1 / 3, 1 / 3, 0.5, 0.5], [1 / 3, 0.5, 1]),
        ("/least", [0, 0, 0, 0.5, 0.5], [0, 0.5, 1]),
    ],
)
def test_a_list_weighs_answer_by_answer(whole: str, tokens: list[float], samples: list[float], tmp_path: Path) -> None:
    """Beside a row with one number for all of it, and one without an answer."""
    file = tmp_path / "w.jsonl"
    rows = {"a": [1, 0], "b": 0.5, "c": []}
    file.write_text("".join(json.dumps({"key": key, "w": value}) + "\n" for key, value in rows.items()))
    text = f"file:{file}:w{whole}"
    select = {"reg": parse_selector("reg", text)}
    column = select["reg"].column
    texts = {"a": text_of(1, 2), "b": text_of(2), "c": text_of()}
    given = [
        column.of(SimpleNamespace(key=key, text=one, sample=SimpleNamespace(place="here")))
        for key, one in texts.items()
    ]  # type: ignore[union-attr,arg-type]
    batch: Any = SimpleNamespace(
        batch=SimpleNamespace(counts={"response": (3, 2, 0)}),
        columns={column.text: tuple(given)},  # type: ignore[union-attr]
        student_text=tuple(texts.values()),
    )
    found = select["reg"].weights(batch, None, torch.device("cpu"))
    assert found.tokens.tolist() == pytest.approx(tokens) and found.samples.tolist() == pytest.approx(samples)
    check_columns(select, lambda: rows, ["sft"])
    other: Any = SimpleNamespace(key="a", text=text_of(1, 2, 3), sample=SimpleNamespace(place="here"))
    with pytest.raises(KdcliError, match=r"2 numbers for row a \(here\), which has 3 answers"):
        column.of(other)  # type: ignore[union-attr]
    file.write_text(json.dumps({"key": "a", "w": [1, -1]}) + "\n")
    with pytest.raises(KdcliError, match="row 1: w holds -1"):
        parse_selector("reg", text)


def test_denominators_are_sums_of_weights() -> None:
    """Of tokens, of vision rows by their sample, of samples; a sum over a sample's rows counts the mean of its weights."""
    weights = TermWeights(torch.tensor([0.9, 0.8, 0.4, 0.3, 0.6]), torch.tensor([0.5, 1.0, 2.0]))
    counts = {"response": COUNTS, "vision": (4, 0, 1), "answer": COUNTS}
    terms = {
        "reg": RowTerm(1.0, "response", label_loss),
        "sum": RowTerm(1.0, "answer", label_loss, sum_rows=True),
        "vis": RowTerm(1.0, "vision", label_loss, skip_first=1),
        "rel": SampleTerm(1.0, lambda sample: torch.zeros(())),
    }
    found = count_rows(counts, terms, dict.fromkeys(terms, weights))
    assert found == pytest.approx({"reg": 3.0, "sum": 0.85 + 1.3 / 3, "vis": 1.5, "rel": 2.5})


SELECT = {"reg": "unless-contradicted:{}", "res": "confidence", "vis": "confidence/least", "rel": "confidence/mean"}


def in_a_gap(values: torch.Tensor) -> float:
    """A threshold far from every value, in their middle third: rounding moves no row across it."""
    ordered, third = values.sort().values, len(values) // 3
    at = third + int(ordered.diff()[third : 2 * third].argmax())
    return float(ordered[at : at + 2].mean())


def test_a_selected_step_equals_the_weighted_means_of_the_live_teacher(
    open_stage: Callable[..., Any], tiny_cache: Path, tiny_teacher: Path, teacher_parts: Any
) -> None:
    """Loss, terms and gradients of Σ w·value / Σ w written out, the weights from the teacher's own float64 distributions."""
    settings = {"per_device_train_batch_size": 12, "max_steps": 1, "parts": ("caption", "sft"), "max_grad_norm": 0.0}
    trainer, batches_from = open_stage(tiny_cache, **settings)
    _, (one,) = next(iter(batches_from(0)))
    theirs = teacher_batch(tiny_cache, settings["parts"], one.batch.keys, teacher_parts)  # type: ignore[arg-type]
    view = live_view(load64(tiny_teacher), in_float64(theirs), len(teacher_parts[0].tokenizer), one.text)
    sure, best = view.distributions["response"].values.softmax(1).max(1)  # type: ignore[attr-defined]
    middle = in_a_gap(sure[best != one.batch.labels])
    samples = sure.split(list(one.batch.counts["response"]))
    repeated = torch.tensor(one.batch.counts["vision"])
    weights = {
        "reg": ((best == one.batch.labels) | (sure < middle)).double(),
        "res": sure,
        "vis": torch.stack([each.min() for each in samples]).repeat_interleave(repeated),
        "rel": torch.stack([each.mean() for each in samples])[repeated > 0],
    }
    assert 0.2 < weights["reg"].mean() < 0.9
    expected_loss, expected_terms, expected = reference(trainer, one, view, weights)

    select = {term: text.format(middle) for term, text in SELECT.items()}
    trainer, batches_from = open_stage(tiny_cache, select=select, **settings)
    loss, terms, gradients = loss_and_gradients(trainer, next(iter(batches_from(0)))[1])
    assert loss == pytest.approx(expected_loss, rel=1e-4) and terms == pytest.approx(expected_terms, rel=1e-4)
    assert gradients.keys() == expected.keys()
    off = torch.cat([(gradients[n].double() - g).flatten() for n, g in expected.items()])
    assert off.norm() <= 1e-3 * torch.cat([g.flatten() for g in expected.values()]).norm()


def test_a_cache_that_cannot_serve_it_is_told_the_field() -> None:
    needs = needs_of({"reg": parse_selector("reg", "agreement")})
    assert serve(needs, {"response_topk": {}}, "sft", "C").names == ["response_topk"]
    assert "another than the teacher's" in serve(needs, {"response_hidden": {"codec": "sketch"}}, "sft", "C").notes[0]
    said = r"C: method sft needs response_likeliest \(for `select`\).*add-field C --field response_topk"
    with pytest.raises(KdcliError, match=said):
        serve(needs, {"response_sampled": {}, "vision_hidden": {"codec": "bf16"}}, "sft", "C")


def test_the_likeliest_token_from_whole_logits_is_that_of_the_head(tiny_cache: Path) -> None:
    cache = TeacherCache(str(tiny_cache))
    row = CachedSamples(cache, ("sft",), ("response_hidden", "response_topk")).read(0, 0)
    dense = likeliest(
        DenseTeacher(row.fields["response_hidden"].float(), cache.teacher_head("response_hidden").float())
    )
    ids, probability = likeliest(HeadAndTail(row.fields["response_topk"], 1))
    step = cache.fields["response_topk"]["params"]["step"]
    assert torch.equal(dense[0], ids) and torch.allclose(dense[1], probability, rtol=2 * step), "log-probs are in steps"


def test_weights_of_a_file_and_of_the_mixture(
    tiny_cache: Path, tmp_path: Path, open_stage: Callable[..., Any], first_step: Callable[..., Any]
) -> None:
    """By row key; rows without one, weights that are none, and a file of zeros are one line each."""
    rows = CachedSamples(TeacherCache(str(tiny_cache)), ("caption",), ())
    keys = list(rows.keys())
    file = tmp_path / "w.parquet"

    def write(values: list[Any], there: list[str] = keys) -> dict[str, Any]:
        pq.write_table(pa.table({"key": there, "w": values}), file)
        return {"reg": parse_selector("reg", f"file:{file}:w")}

    check_columns(write([float(n) for n in range(len(keys))]), rows.keys, ("caption",))
    with pytest.raises(KdcliError, match=f"no number for 2 rows of part caption, the first is {keys[0]}"):
        check_columns(write([1.0] * (len(keys) - 2), keys[2:]), rows.keys, ("caption",))
    with pytest.raises(KdcliError, match="the weight of every row of part caption is 0"):
        check_columns(write([0.0] * len(keys)), rows.keys, ("caption",))
    for wrong, says in (
        ([1.0] * (len(keys) - 1) + [-1.0], f"row {len(keys)}: w holds -1.0"),
        ([None] * len(keys), "holds None"),
    ):
        with pytest.raises(KdcliError, match=says):
            write(wrong)
    with pytest.raises(KdcliError, match="has no column v; it has key, w"):
        parse_selector("reg", f"file:{file}:v")
    with pytest.raises(KdcliError, match="its mixture has no column quality there"):
        first_step(tiny_cache, parts=("caption",), max_steps=1, select={"reg": "column:quality"})

    # One row alone counts: the step is the step over that row.
    (tmp_path / "w.jsonl").write_text("".join(json.dumps({"key": k, "w": float(k == keys[1])}) + "\n" for k in keys))
    asked = {"parts": ("caption",), "max_steps": 1, "select": {"reg": f"file:{tmp_path / 'w.jsonl'}:w"}}
    trainer, batches_from = open_stage(tiny_cache, "DPT", per_device_train_batch_size=len(keys), **asked)
    _, (whole,) = next(iter(batches_from(0)))
    result = trainer.step(0, [whole])
    single = next(n for n, key in enumerate(whole.batch.keys) if key == keys[1])
    counts = whole.batch.counts["response"]
    assert result.kept == {"reg": pytest.approx(counts[single] / sum(counts))}
    nobody = replace(whole, columns={text: (0.0,) * len(keys) for text in whole.columns})
    said: list[str] = []
    trainer.say = said.append
    assert trainer.step(0, [nobody]).terms["reg"] == 0 and "select keeps no row of term reg" in said[0]


def test_a_step_leaves_single_answers_out(tiny_cache: Path, tmp_path: Path, open_stage: Callable[..., Any]) -> None:
    """Of every row the first answer alone counts: the step's share of tokens is that of first answers."""
    rows = CachedSamples(TeacherCache(str(tiny_cache)), ("sft",), ())
    lines, first, every = [], 0, 0
    for position, count in enumerate(rows.counts):
        for number in range(count):
            row = rows.read(position, number)
            lengths = answer_lengths(row.text)
            lines.append(json.dumps({"key": row.key, "right": [float(n == 0) for n in range(len(lengths))]}))
            first, every = first + lengths[0], every + sum(lengths)
    (tmp_path / "w.jsonl").write_text("\n".join(lines))
    select = {"reg": f"file:{tmp_path / 'w.jsonl'}:right"}
    settings = {"per_device_train_batch_size": len(lines), "max_steps": 1, "parts": ("sft",)}
    trainer, batches_from = open_stage(tiny_cache, select=select, **settings)
    _, (whole,) = next(iter(batches_from(0)))
    assert trainer.step(0, [whole]).kept == {"reg": pytest.approx(first / every)} and 0 < first < every
