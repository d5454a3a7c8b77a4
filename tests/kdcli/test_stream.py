"""The datasets of a cache: rows by number, the stream's order, loader processes, ranks, resuming, and what a batch carries."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import kdcli
from student_train.library.signals import SignalSource, TeacherSignals
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError
from teacher_cache.reading.cached_samples import CachedSamples


@pytest.fixture
def rows(tiny_cache: Path, processor: Any, student: Any) -> Any:
    cache = kdcli.open_cache(str(tiny_cache))
    return cache.dataset(["sft"], method="llava-kd", processor=processor, config=student.config)


def loader(rows: Any, stream: Any, workers: int = 0) -> DataLoader:
    return DataLoader(stream, batch_size=None, collate_fn=kdcli.Collator(rows), num_workers=workers)


def keys(batches: Any) -> list[tuple[str, ...]]:
    return [one["teacher"].keys for one in batches]


def test_the_stream_is_that_of_train_student(rows: Any, open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    _, batches_from = open_stage(
        tiny_cache, parts=("sft",), seed=3, per_device_train_batch_size=4, num_train_epochs=2.0, packing=False
    )
    theirs = [one for _, batches in batches_from(0) for one in batches]
    ours = list(loader(rows, rows.stream(4, seed=3, epochs=2.0)))
    assert keys(ours) == [one.batch.keys for one in theirs] and len(ours) == len(rows.stream(4, epochs=2.0)) == 11
    for mine, whole in zip(ours, theirs):
        assert all(torch.equal(mine[name], value) for name, value in whole.batch.inputs.items())
        labels = mine["labels"][:, 1:].flatten()  # as a model shifts them
        assert torch.equal(labels[labels != -100], whole.batch.labels)
        assert torch.equal(mine["teacher"].labels, whole.batch.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_stream_goes_on_as_an_undisturbed_one(rows: Any, workers: int) -> None:
    whole = keys(loader(rows, rows.stream(4, seed=1), workers))
    stream = rows.stream(4, seed=1)
    used = []
    for batch in loader(rows, stream, workers):
        used.append(batch["teacher"].keys)
        if len(used) == 3:
            state = json.loads(json.dumps(stream.state_dict(after=batch)))
            break
    later = rows.stream(4, seed=1)
    later.load_state_dict(state)
    assert used + keys(loader(rows, later, workers)) == whole == keys(loader(rows, rows.stream(4, seed=1)))
    assert keys(loader(rows, later, workers)) == whole, "the next pass begins at the start"
    if workers:
        with pytest.raises(KdcliError, match="after=batch"):
            stream.state_dict()
    else:
        assert stream.state_dict() == state


@pytest.mark.parametrize(("workers", "steps"), [(0, 3), (2, 1)])
def test_torchdata_keeps_and_loads_the_state_by_itself(rows: Any, workers: int, steps: int) -> None:
    """Asked in each loader process, of which some have read nothing yet."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def open_loader() -> Any:
        stream = rows.stream(4, seed=1)
        return stateful.StatefulDataLoader(
            stream, batch_size=None, collate_fn=kdcli.Collator(rows), num_workers=workers
        )

    interrupted, later = open_loader(), open_loader()
    used = [batch["teacher"].keys for _, batch in zip(range(steps), interrupted)]
    later.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    whole = keys(open_loader())
    assert used + keys(later) == whole and keys(later) == whole


def test_the_state_of_another_stream_is_refused(rows: Any) -> None:
    state = rows.stream(4, seed=1).state_dict()
    with pytest.raises(KdcliError, match=r"another stream: seed: there 1, here 2"):
        rows.stream(4, seed=2).load_state_dict(state)


def test_ranks_share_the_rows_of_a_stream(rows: Any) -> None:
    every = [keys(loader(rows, rows.stream(2, rank=rank, world=2))) for rank in (0, 1)]
    together = [tuple(sum(zip(*pair), ())) for pair in zip(*every)]
    alone = keys(loader(rows, rows.stream(4)))
    assert together[:-1] == alone[:-1] and len(every[0]) == len(every[1]) == len(alone)
    last = [list(loader(rows, rows.stream(2, rank=rank, world=2)))[-1]["teacher"] for rank in (0, 1)]
    assert [one.filler for one in last] == [False, True]  # 21 rows: one is left


def test_rows_are_read_by_number(rows: Any) -> None:
    assert len(rows) == 21
    batch = kdcli.Collator(rows)([rows[3], rows[-1]])
    assert batch["teacher"].keys == (rows[3].prepared.key, rows[20].prepared.key)
    shuffled = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=kdcli.Collator(rows))
    assert sorted(sum(keys(shuffled), ())) == sorted(row.prepared.key for row in map(rows.__getitem__, range(21)))
    with pytest.raises(IndexError, match="21 rows"):
        rows[21]


def test_a_loader_without_batch_size_none_gives_the_same_batches(rows: Any) -> None:
    plain = DataLoader(rows.stream(4), collate_fn=kdcli.Collator(rows))
    assert keys(plain) == keys(loader(rows, rows.stream(4)))


def test_loader_processes_send_records_and_no_heads(rows: Any) -> None:
    """What travels is small beside the head, and is read with the head of the process that it comes to."""
    sent = pickle.dumps(rows.source)
    assert b"weight" not in sent and len(sent) < 1000 and pickle.loads(sent) is rows.source
    (mine,) = [one for one in loader(rows, rows.stream(21))]
    (theirs,) = [one for one in loader(rows, rows.stream(21), workers=1)]
    assert theirs["teacher"].source is rows.source
    for kind in ("response", "vision"):
        assert torch.equal(mine["teacher"].log_probs(kind), theirs["teacher"].log_probs(kind))


def test_signals_are_the_teachers_own(rows: Any, teacher_model: Any, tiny_cache: Path, processor: Any) -> None:
    """From hidden states: the log-probs that the teacher's forward gives, at the student's positions (both see one grid)."""
    batch = kdcli.Collator(rows)([rows[0], rows[1], rows[2]])
    teacher = batch["teacher"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "teacher")}
    with torch.no_grad():
        logits = teacher_model(**inputs).logits.flatten(0, 1)
    for kind in ("response", "vision"):
        said = teacher.log_probs(kind)
        theirs = logits[teacher.positions(kind)][:, : said.shape[1]].log_softmax(1)
        assert torch.allclose(said, theirs, atol=1e-4) and len(said) == sum(teacher.counts(kind))
        ids, best = teacher.top_k(3, kind)
        assert torch.equal(best, said.topk(3).values) and torch.equal(said.gather(1, ids), best)


def test_hidden_states_and_affinities_are_the_teachers_own(
    tiny_cache: Path, student: Any, processor: Any, teacher_model: Any
) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    needs = ["response_hidden", "vision_hidden", "vision_text_affinity"]
    rows = cache.dataset(needs=needs, processor=processor, config=student.config)
    batch = kdcli.Collator(rows)([rows[0], rows[12]])  # a caption, a chat
    teacher = batch.pop("teacher")
    del batch["labels"]
    with torch.no_grad():
        states = teacher_model.model(**batch).last_hidden_state.flatten(0, 1)
    for kind in ("response", "vision"):
        assert torch.allclose(teacher.hidden(kind), states[teacher.positions(kind)], atol=1e-4)
    ends = torch.tensor(teacher.counts("vision")).cumsum(0)[:-1], torch.tensor(teacher.counts("answer")).cumsum(0)[:-1]
    vision = states[teacher.positions("vision")].tensor_split(ends[0])
    answer = states[teacher.positions("answer")].tensor_split(ends[1])
    for said, *sides in zip(teacher.affinity, vision, answer):
        assert torch.allclose(said, kdcli.losses.cosine_affinity(*sides), atol=0.5 / 127 + 1e-4)


def test_signals_need_no_student(tiny_cache: Path, rows: Any) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    needs = ["response_logits", "response_hidden", "vision_text_affinity"]
    few = cache.signals([4, 2], needs=needs, parts=["sft"])
    batch = kdcli.Collator(rows)([rows[4], rows[2]])["teacher"]
    assert few.keys == batch.keys and few.counts() == batch.counts() and few.counts("vision") == batch.counts("vision")
    assert torch.equal(few.labels, batch.labels) and torch.equal(few.log_probs(), batch.log_probs())
    assert few.hidden().shape == (len(few.labels), cache.teacher["hidden_size"])
    assert [one.shape[0] for one in few.affinity] == list(few.counts("vision"))
    with pytest.raises(KdcliError, match=r"vision_hidden was not asked for \(asked: response_hidden, "):
        few.hidden("vision")
    with pytest.raises(KdcliError, match="a dataset with a processor"):
        few.positions()
    with pytest.raises(CacheError, match="no row 31: part caption, sft has 31 rows"):
        cache.signals([31], needs="response_logits")


def test_a_cache_says_what_it_has(tiny_cache: Path, tmp_path: Path) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    assert cache.parts == ("caption", "sft") and cache.rows == {"caption": 10, "sft": 21} and len(cache) == 31
    assert cache.fields["vision_topk"]["k"] == 8 and cache.teacher["hidden_size"] == 48
    assert cache.tokenizer.decode(cache.signals([0], needs=[]).labels)
    with pytest.raises(CacheError, match="manifest"):
        kdcli.open_cache(str(tmp_path / "nowhere"))


def test_what_is_asked_wrongly_is_one_line(tiny_cache: Path, processor: Any, student: Any, deep_student: Path) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    given: dict[str, Any] = {"processor": processor, "config": student.config}
    for asked, said in [
        ({}, "a method, or needs"),
        ({"method": "kd", "needs": []}, "not both"),
        ({"needs": "logits"}, "no need 'logits': choose from response_likeliest, response_logits"),
        ({"method": "kdd"}, "unknown method 'kdd'"),
        ({"method": "kd", "parts": ["SFT"]}, "no part SFT; it has caption, sft"),
        ({"method": "kd", "config": None}, r"processor with config=model\.config"),
        ({"method": "kd", "processor": None}, "give the student's processor"),
    ]:
        with pytest.raises(KdcliError, match=said):
            cache.dataset(**{**given, **asked})
    with pytest.raises(KdcliError, match="made for needs"):
        kdcli.losses.StepLoss(student, cache.dataset(needs=[], **given))
    with pytest.raises(KdcliError, match="total_steps"):
        kdcli.losses.StepLoss(student, cache.dataset(method="epic-tcd", processor=str(deep_student)))


def test_top_k_alone_says_what_it_does_not_know(tiny_cache: Path) -> None:
    cache = kdcli.open_cache(str(tiny_cache))
    whole = cache.signals([0], needs="response_logits")
    found = CachedSamples(cache.reader, ["caption"], ["response_topk"]).read(0, 0)
    batch = replace(whole.batch, fields={"response_topk": [found.fields["response_topk"]]})
    few = TeacherSignals(SignalSource(str(tiny_cache), {"response_logits": ("response_topk",)}), batch)
    assert torch.equal(few.top_k(8)[0], whole.top_k(8)[0])
    with pytest.raises(CompatibilityError, match="response_topk alone, which does not know every token"):
        few.log_probs()
    with pytest.raises(CompatibilityError, match="the 8 likeliest, top_k was asked for 9"):
        few.top_k(9)
