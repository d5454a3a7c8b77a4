"""Answers that survive a kill and a full disk: the same evaluation goes on from them, another one is refused, and nothing is left over."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import pipelines.judge.evaluation.run as evaluation
from cli import main
from pipelines.judge.evaluation.kept import KeepIn, keeping, model_hash, partial_of, set_states, states_of
from pipelines.judge.evaluation.run import evaluate_folder
from teacher_cache.errors import CompatibilityError, DiskError, KdcliError
from teacher_cache.sources import DataSpec

LIMIT, BATCH = 6, 2


class Killed(BaseException):
    """The process ends in the middle."""


@pytest.fixture
def heldout(world: Any) -> DataSpec:
    return DataSpec("heldout", str(world.heldout), image_root=str(world.images), limit=LIMIT)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many questions each call of the model was asked; while ``die_at`` batches are over, the next one is a kill."""
    counts: list[int] = []
    real = evaluation.answers_or_skips

    def counted(model: Any, processor: Any, prompts: Any, *more: Any, **how: Any) -> Any:
        if asked.die_at == len(counts):  # type: ignore[attr-defined]
            raise Killed
        counts.append(len(prompts))
        return real(model, processor, prompts, *more, **how)

    class Asked(list):  # type: ignore[type-arg]
        die_at = -1

    asked = Asked()
    monkeypatch.setattr(evaluation, "answers_or_skips", counted)
    asked.counts = counts  # type: ignore[attr-defined]
    yield asked


def go(model: Path, spec: DataSpec, file: Path | None, **how: Any) -> dict[str, Any]:
    how = {"batch_size": BATCH, "max_new_tokens": 4, "device": "cpu"} | how
    return evaluate_folder(str(model), spec, kept_in=KeepIn(file) if file else None, **how)


RANDOM = {"compress": "random", "keep": 9, "compress_layer": 1}


@pytest.mark.parametrize("how", [{}, RANDOM], ids=["plain", "random draws"])
def test_a_killed_evaluation_goes_on_and_says_the_same(
    tiny_student: Path, heldout: DataSpec, asked: Any, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Also where vision tokens are drawn at random: the generators go on as if nothing had happened. A kill cut the last line."""
    whole, file = go(tiny_student, heldout, None, **how), tmp_path / "a.jsonl.partial"
    asked.counts.clear()
    asked.die_at = 2
    with pytest.raises(Killed):
        go(tiny_student, heldout, file, **how)
    file.write_bytes(file.read_bytes()[:-7])
    asked.die_at = -1
    asked.counts.clear()
    told: list[int] = []
    assert go(tiny_student, heldout, file, advance=told.append, **how) == whole
    assert asked.counts == [BATCH, BATCH] and sum(told) == LIMIT, "one batch of three was kept"
    asked.counts.clear()
    assert go(tiny_student, heldout, file, **how) == whole and not asked.counts
    assert go(tiny_student, heldout, file, metrics=("anls",), **how)["anls"] is not None and not asked.counts


def test_another_model_question_or_setting_is_refused(
    tiny_student: Path, heldout: DataSpec, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    file, model = tmp_path / "a.partial", copy_of(tiny_student)
    result = go(model, heldout, file)
    before = file.read_bytes()
    others: list[dict[str, Any]] = [{"max_new_tokens": 5}, {"batch_size": 3}, {"prompt_suffix": "x"}, RANDOM]
    for how in others:
        with pytest.raises(CompatibilityError, match=r"answers of another evaluation: .*remove it"):
            go(model, heldout, file, **how)
    rows = json.loads(Path(heldout.path).read_text())
    rows[0]["conversations"][-1]["value"] = "another answer"
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with pytest.raises(CompatibilityError, match="questions"):
        go(model, DataSpec("heldout", str(tmp_path / "other.json"), heldout.image_root, limit=LIMIT), file)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CompatibilityError, match="model"):
        go(model, heldout, file)
    assert file.read_bytes() == before
    assert (
        evaluate_folder(str(model), heldout, BATCH, "cpu", max_new_tokens=4, kept_in=KeepIn(file, anew=True))["n"]
        == result["n"]
    )
    assert file.read_bytes() != before


@pytest.mark.parametrize("at", range(0, 100, 9))
def test_a_flipped_bit_costs_the_rest_and_nothing_else(tmp_path: Path, at: int) -> None:
    """Wherever it is: what is given back was written so."""
    file, rows = (
        tmp_path / "a.partial",
        [
            [{"given": f"g{i}", "nats": 0.5, "tokens": 1, "nll_skip": None, "sure": [0.5], "right": [True]}]
            for i in range(4)
        ],
    )
    with keeping(KeepIn(file), {"model": "m"}) as kept:
        for one in rows:
            kept.add(one, [])
    data = bytearray(file.read_bytes())
    data[at * len(data) // 100] ^= 1
    file.write_bytes(data)
    with keeping(KeepIn(file), {"model": "m"}) as kept:
        assert kept.batches == rows[: len(kept.batches)] and len(kept.batches) < 4
        for one in rows[len(kept.batches) :]:
            kept.add(one, [])
    with keeping(KeepIn(file), {"model": "m"}) as kept:
        assert kept.batches == rows


def test_two_at_once_and_what_is_no_file(tmp_path: Path) -> None:
    file = tmp_path / "a.partial"
    with keeping(KeepIn(file), {}), pytest.raises(KdcliError, match="another evaluation keeps its answers there"):
        keeping(KeepIn(file), {}).__enter__()
    with file.open() as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KdcliError, match="pipe is not a file"):
        keeping(KeepIn(tmp_path / "pipe"), {}).__enter__()
    assert partial_of(None, "/dev/stdout", str(tmp_path / "s.json")) == KeepIn(tmp_path / "s.json.partial")
    assert partial_of("/dev/null") is None and partial_of(None) is None


def test_generators_go_on_where_they_were() -> None:
    first = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert states_of(first) == []
    torch.randperm(9, generator=first[1])
    again = [torch.Generator().manual_seed(0) for _ in range(2)]
    set_states(again, states_of(first))
    assert [torch.rand(1, generator=one) for one in first] == [torch.rand(1, generator=one) for one in again]


def test_a_model_is_its_files(copy_of: Callable[[Path], Path], tiny_student: Path) -> None:
    model = copy_of(tiny_student)
    before = model_hash(str(model))
    (model / "README.md").write_text("x")
    assert model_hash(str(model)) == before != model_hash("org/name") == "org/name"
    (model / "chat_template.jinja").write_text("x")
    assert model_hash(str(model)) != before


def test_a_full_disk_keeps_what_was_answered(
    tiny_student: Path, heldout: DataSpec, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line: one line, scores of before stay, the same command goes on; then nothing but the result is left."""
    out, answers = tmp_path / "s.json", tmp_path / "a.jsonl"
    out.write_text('{"before": true}')
    line = ["eval", str(tiny_student), "--data", heldout.path, "--image-root", str(heldout.image_root), "--limit", "6"]
    line += [
        "--batch-size",
        "2",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--answers",
        str(answers),
    ]
    for place in ("write_record", "write_whole"):
        with monkeypatch.context() as patch:
            module = "pipelines.train.run_records" if place == "write_record" else "teacher_cache.whole_file"

            def full(path: Path, body: Any) -> None:
                raise DiskError(f"{path}: cannot be written (No space left on device): make room")

            patch.setattr(f"{module}.{place}", full)
            done = CliRunner().invoke(main, line)
        assert done.exit_code == 1 and "make room" in done.stderr and "Traceback" not in done.output
        assert (tmp_path / "a.jsonl.partial").is_file() and not answers.exists()
    assert asked.counts == [2, 2, 2], "asked once"
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0, done.output
    assert asked.counts == [2, 2, 2]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.jsonl", "s.json"]
    assert len(answers.read_text().splitlines()) == LIMIT and "before" not in out.read_text()


def test_where_nothing_can_be_written_nothing_is_asked(
    tiny_student: Path, heldout: DataSpec, asked: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = ["eval", str(tiny_student), "--data", heldout.path, "--image-root", str(heldout.image_root)]
    done = CliRunner().invoke(main, [*line, "--out", str(tmp_path / "file" / "s.json")])
    assert done.exit_code == 1 and "cannot be written (Not a directory)" in done.stderr and not asked.counts
