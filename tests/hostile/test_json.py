"""JSON and TOML that Python reads otherwise than one thinks: huge numbers, NaN, depth, doubled keys, half characters, long texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import cli
from benchmarks.fuzz_targets import Folder, small_cache
from pipelines.capture import canaries, heartbeat
from pipelines.command_line.given import parse_knobs
from pipelines.inspect.cache import status
from pipelines.settings import load_settings
from pipelines.terminal.tables import work_lines
from student_train.checkpoint import Checkpoints
from student_train.distributed import Processes
from student_train.metrics_log import _step_of
from student_train.whole import read_card
from teacher_cache.errors import CacheError, DataError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.shards.schema import COUNT, misfit, require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec, open_source

TALK = '[{"from":"human","value":"What?"},{"from":"gpt","value":"A square."}]'
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
ODD = {
    "an infinite number": "1e999",
    "a number of 5,000 digits": DIGITS,
    "NaN": "NaN",
    "endless nesting": DEEP,
    "half a character": '"\\ud800"',
    "a long text": json.dumps("x" * 2_000_000),
    "control characters": '"\\u001b[2J\\u0000"',
    "an object with a key twice": '{"a":1,"a":2}',
}
SKIPPED = {"a number of 5,000 digits", "endless nesting", "half a character"}
"""As a further column: the row cannot be held; the other values can, or are left out."""


def rows_of(tmp_path: Path, *rows: str) -> list[Sample | SkipRecord]:
    path = tmp_path / "rows.json"
    path.write_text(f"[{','.join(rows)}]")
    source = open_source(DataSpec("sft", str(path)))
    return [row for group in source.scan(2) for row in source.read(group)]


@pytest.mark.parametrize("kind", ODD)
def test_a_further_column_of_a_mixture(tmp_path: Path, kind: str) -> None:
    good = f'{{"id":"a","conversations":{TALK}}}'
    found = rows_of(tmp_path, good, f'{{"id":"b","conversations":{TALK},"more":{ODD[kind]}}}', good)
    assert [row.ordinal for row in found] == [0, 1, 2] and isinstance(found[0], Sample) and isinstance(found[2], Sample)
    assert isinstance(found[1], SkipRecord) == (kind in SKIPPED)
    if isinstance(found[1], SkipRecord):
        assert found[1].reason == "bad_row" and found[1].place == "rows.json row 1"
    else:
        json.dumps(dict(found[1].extra), allow_nan=False)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("key", ["id", "image", "conversations", "messages", "system", "weight"])
def test_a_column_of_the_format(tmp_path: Path, key: str, kind: str) -> None:
    """A row or a skip record with a reason; never another error, never a lost row."""
    row = {"id": '"b"', "conversations": TALK} | {key: ODD[kind]}
    (found,) = rows_of(tmp_path, "{" + ",".join(f'"{name}":{value}' for name, value in row.items()) + "}")
    assert found.ordinal == 0
    if key == "conversations":
        assert isinstance(found, SkipRecord) and found.reason == "bad_row"


def test_a_key_twice_counts_as_the_last(tmp_path: Path) -> None:
    (found,) = rows_of(tmp_path, f'{{"id":"a","id":"b","conversations":[],"conversations":{TALK}}}')
    assert isinstance(found, Sample) and found.source_id == "b" and len(found.turns) == 2


def test_what_is_no_json_names_file_row_and_byte(tmp_path: Path) -> None:
    for broken in ('{"id":}', '{"id":1,}', "{'id':1}", '{"id":"a', "nul", '{"a":"\\x"}'):
        with pytest.raises(DataError, match=r"rows\.json.* row 1, byte \d+"):
            rows_of(tmp_path, '{"id":"a"}', broken)


# Documents of a cache


def with_text(whole: bytes, key: str, text: str) -> bytes:
    """A document whose value of ``key`` is this JSON text; its checksum, where Python can take one, is right."""
    body = {**unseal(whole, ""), key: "HERE"}
    try:
        return seal({**body, key: json.loads(text)})
    except (ValueError, RecursionError):
        return json.dumps(body).replace('"HERE"', text).encode()


PLACES = {
    "manifest.json": ("parts", "slices", "seed", "preparation", "plan_hash"),
    "samples/commits/000000.json": ("rows", "tar_bytes", "skipped", "counts", "tar", "shard"),
    "fields/vision_hidden/field.json": ("version", "params", "teacher", "teacher_folder", "calibration"),
}


def test_a_document_that_was_cut_is_never_whole() -> None:
    """Not even without its last byte, which JSON could do without."""
    whole = seal({"rows": 5, "tar": {"name": "x"}})
    assert unseal(whole, "place") == {"rows": 5, "tar": {"name": "x"}}
    for size in range(len(whole)):
        with pytest.raises(CacheError, match="place: damaged or edited"):
            unseal(whole[:size], "place")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", PLACES)
def test_a_document_of_a_cache(name: str, kind: str) -> None:
    folder = Folder()
    for key in PLACES[name]:
        if (key, kind) == ("counts", "an object with a key twice"):
            continue  # counts of something: as good as any
        with pytest.raises(CacheError, match=re.escape(str(folder.path))):
            folder.read_with(name, with_text(small_cache()[name], key, ODD[kind]))
    folder.read_all()


@pytest.mark.parametrize("kind", ODD)
def test_what_a_worker_says_is_shown_or_left_out(kind: str) -> None:
    for key in ("worker", "host", "started", "updated", "shard", "shard_rows", "rows", "error"):
        body = {"worker": "w", "host": "h", "started": 0.0, "updated": 1.0} | {key: "HERE"}
        word = heartbeat.parse_word(json.dumps(body).replace('"HERE"', ODD[kind]).encode())
        assert "\x1b" not in json.dumps(heartbeat.summary([word] if word else [], 100, now=2.0))
    folder = Folder()
    folder.write("progress/a.json", DEEP.encode())
    folder.write("progress/b.json", b'{"worker":"w","host":"h","started":"now","updated":[]}')
    said = status(TeacherCache(str(folder.path)))
    assert said["work"] is None and work_lines(heartbeat.summary([], 3))


@pytest.mark.parametrize("kind", ODD)
def test_a_receipt_of_canaries(tmp_path: Path, kind: str) -> None:
    whole = {"keys": [["sft", "k"]], "input_ids": ["ab"], "sha256_of_states": "ab", "dtype": "float32", "floor": 0.0}
    whole |= {"floor_logit": 0.1}
    storage = Storage(tmp_path)
    for key in whole:
        (tmp_path / canaries.RECEIPT).write_bytes(with_text(seal(whole), key, ODD[kind]))
        try:
            assert canaries.receipt(storage, ".") is not None and isinstance(whole[key], str)
        except CacheError as error:
            assert canaries.RECEIPT in str(error)


# Documents of a run


def checkpoints_of(folder: Path, model: torch.nn.Module, identity: dict[str, Any]) -> Checkpoints:
    alone = Processes(0, 1, torch.device("cpu"))
    return Checkpoints(folder, model, torch.optim.SGD(model.parameters()), identity, 1, alone)


@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_or_a_finished_stage(tmp_path: Path, kind: str) -> None:
    saved = checkpoints_of(tmp_path, torch.nn.Linear(2, 2), {"of": "this run"})
    saved.save(1)
    saved.wait()
    folder = tmp_path / "step-0000001"
    for key in ("step", "identity"):
        state = {"step": 1, "identity": {"of": "this run"}} | {key: "HERE"}
        (folder / "state.json").write_text(json.dumps(state).replace('"HERE"', ODD[kind]))
        with pytest.raises(KdcliError, match="step-0000001"):
            saved.load()
    done = tmp_path / "done.json"
    for text in (ODD[kind], "", "{", f'{{"identity":{ODD[kind]},"result":3}}'):
        done.write_text(text)
        with pytest.raises(KdcliError, match=r"done\.json"):
            read_card(done, {"identity": dict, "result": dict})
    for line in (ODD[kind], f'{{"step":{ODD[kind]}}}'):
        assert _step_of(line, 7) == 7, "a line that is none is dropped"


def test_a_checkpoint_of_other_shapes_is_no_broadcast(tmp_path: Path) -> None:
    small, wide = torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    saved = checkpoints_of(tmp_path, small, {})
    saved.save(1)
    saved.wait()
    with pytest.raises(KdcliError, match="do not match this student"):
        checkpoints_of(tmp_path, wide, {}).load()


# Settings


@pytest.mark.parametrize(
    "line",
    [
        f"seed = {DIGITS}",
        "seed = 0x" + "f" * 40,
        "seed = " + "[" * 20_000,
        "learning_rate = nan",
        "learning_rate = inf",
        "learning_rate = 1e999",
        'student = "\\ud800"',
        "seed = 1\nseed = 2",
        "bf16 = 1",
        "max_steps = 1.5",
    ],
    ids=lambda line: line[:20],
)
def test_kd_toml(tmp_path: Path, line: str) -> None:
    (tmp_path / "kd.toml").write_text(f"[train]\n{line}\n")
    with pytest.raises(KdcliError, match=r"kd\.toml"):
        load_settings(tmp_path / "kd.toml")


@pytest.mark.parametrize("value", [DEEP, DIGITS])
def test_a_knob_of_the_command_line(value: str) -> None:
    with pytest.raises(KdcliError, match="--set gamma"):
        parse_knobs((f"gamma={value}",))


def test_one_line_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_text("x = " + "[" * 20_000)
    found = CliRunner().invoke(cli.main, ["doctor", "--config", str(tmp_path / "kd.toml")])
    assert found.exit_code == 1 and found.output.count("\n") == 1 and "kd.toml" in found.output


# The shape of a document


CASES: list[tuple[Any, Any, str]] = [
    (3, COUNT, ""),
    (-1, COUNT, "it must be a whole number from 0"),
    (True, COUNT, "it must be a whole number from 0"),
    (1 << 62, int, "it must be a whole number"),
    (float("nan"), float, "it must be a finite number"),
    (3, float, ""),
    (None, (str, None), ""),
    (3, (str, None), "it must be text"),
    ("\ud800", str, "it must be text"),
    ([1, "a"], [COUNT], "it[1] must be a whole number from 0"),
    ({"a": {"b": 1}}, {"a": {"b": str}}, "a.b must be text"),
    ({"a": {}}, {"a": {"b": str}}, "a.b is missing"),
    ({}, {"a?": str}, ""),
    ([], {"a?": str}, "it must be an object"),
    ({}, [str], "it must be a list"),
    ({"a": 1, "b": -1}, {...: COUNT}, "it.b must be a whole number from 0"),
]


@pytest.mark.parametrize(("value", "kind", "said"), CASES)
def test_what_does_not_fit_is_named(value: Any, kind: Any, said: str) -> None:
    assert misfit(value, kind) == said
    check: Callable[[], Any] = lambda: require(value, kind, "here")  # noqa: E731
    if said:
        with pytest.raises(CacheError, match=re.escape(f"here: {said}")):
            check()
    else:
        assert check() is value
