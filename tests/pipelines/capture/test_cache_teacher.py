"""The capture job: complete, resumable after any kill, the same bytes however it was interrupted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture.cache_teacher import capture
from pipelines.inspect.cache import check, collect_garbage, inspect, status
from pipelines.inspect.find_sample import Asked
from pipelines.terminal.tables import cache_table
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError
from teacher_cache.fields import wants_of
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.commit import read_commit
from teacher_cache.shards.storage import Storage
from teacher_cache.sources import DataSpec
from tests.warm import Warm


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache; what lies in ``.staging`` does not."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and ".staging" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def undisturbed(make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    capture(make_request(out))
    torch.set_num_threads(before)
    return out


@pytest.fixture
def run(warm: Warm, tmp_path: Path) -> Callable[..., int]:
    """``run(request, kill_after=None)``: exit status of a capture in another process, -9 where the kill came in time."""

    def one(request, kill_after: float | None = None) -> int:
        child = warm.start(capture, request, folder=tmp_path)
        if kill_after is not None:
            time.sleep(kill_after)
            child.kill()
        return child.wait()

    return one


def test_rows_are_written_plus_skipped_in_every_column(tiny_cache: Path) -> None:
    summary = status(TeacherCache(str(tiny_cache)))
    assert (summary["rows"], summary["shards"], len(summary["columns"])) == (31, 5, 7)
    for column in summary["columns"].values():
        assert column["done"] == column["shards"] == 5
        assert column["rows"] == column["written"] == 31
        assert column["skipped"] == {}
    counts = [column["counts"] for column in summary["columns"].values()]
    assert all(one == counts[0] for one in counts)
    assert status(TeacherCache(str(tiny_cache)))["rows"] == 31
    assert check(TeacherCache(str(tiny_cache))) == []
    assert collect_garbage(TeacherCache(str(tiny_cache)), remove=False) == []


def test_fields_are_what_the_teacher_says_now(tiny_cache: Path, teacher_model, teacher_parts, mixture) -> None:
    """Every row of the cache against the same teacher asked again, row by row, without shards, windows or batches."""
    from teacher_cache.preparing.prepare import Preparer
    from teacher_cache.teachers.transformers import TransformersTeacher

    cache = TeacherCache(str(tiny_cache))
    rows = CachedSamples(cache, cache.parts(), sorted(cache.fields))
    wants = wants_of(cache.open_field(name) for name in cache.fields)
    teacher = TransformersTeacher.wrap(teacher_model, teacher_parts[0])
    preparer = Preparer(*teacher_parts)
    seen = set()
    for position, count in enumerate(rows.counts):
        for i in range(count):
            row = rows.read(position, i)
            prepared = preparer.prepare(row.sample, cache.template(row.sample.part))
            (said,) = teacher([prepared], wants)
            seen.add((row.sample.part, row.sample.ordinal))
            assert row.key == prepared.key
            assert row.layout == prepared.layout
            assert torch.equal(row.text.response_ids, prepared.text.response_ids)
            for kind in ("vision", "response"):
                torch.testing.assert_close(row.fields[f"{kind}_hidden"], said.hidden[kind], atol=1e-4, rtol=1e-4)
                topk = row.fields[f"{kind}_topk"]
                torch.testing.assert_close(topk.log_probs, said.topk[kind].log_probs, atol=1e-3, rtol=1e-4)
                torch.testing.assert_close(topk.log_tail, said.topk[kind].log_tail, atol=1e-3, rtol=1e-4)
            scale = said.gram.abs().amax().clamp_min(1e-30) if len(said.gram) else 1
            torch.testing.assert_close(row.fields["relation"] / scale, said.gram / scale, atol=1e-3, rtol=0)
    assert seen == {("caption", i) for i in range(10)} | {("sft", i) for i in range(21)}


def test_the_stored_head_makes_the_models_logits(tiny_cache: Path, teacher_model, teacher_parts) -> None:
    head = TeacherCache(str(tiny_cache)).teacher_head("response_hidden")
    weight = teacher_model.get_output_embeddings().weight
    assert torch.equal(head, weight[: len(teacher_parts[0].tokenizer)])


def test_running_again_changes_nothing(tiny_cache: Path, copy_of, make_request) -> None:
    folder = copy_of(tiny_cache)
    before = {name: (folder / name).stat().st_mtime_ns for name in tree(folder)}
    events = []
    summary = capture(make_request(folder), lambda event, done, total: events.append((event, done, total)))
    assert events == [("start", 31, 31), ("end", 31, 31)]
    assert summary["rows"] == 31
    assert {name: (folder / name).stat().st_mtime_ns for name in tree(folder)} == before


@pytest.mark.usefixtures("one_thread")
def test_a_field_added_later_is_the_same_field(undisturbed: Path, make_request, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    capture(make_request(out, fields=("response_topk",)))
    assert not list((out / "teacher").rglob("head*"))
    capture(make_request(out, fields=("response_topk", "vision_hidden", "affinity")))
    capture(make_request(out, fields=("relation", "response_hidden", "vision_topk")))
    assert check(TeacherCache(str(out))) == []
    assert tree(out) == tree(undisturbed)


@pytest.mark.usefixtures("one_thread", "forked_workers")
def test_two_workers_write_the_same_cache(undisturbed: Path, make_request, tmp_path: Path) -> None:
    out = tmp_path / "workers"
    capture(make_request(out, workers=2))
    assert tree(out) == tree(undisturbed)


@pytest.mark.exhaustive  # a death behind every few writes, below, and test_stopped.py's killed commands stand for it
@pytest.mark.parametrize("kill", [3, 10])
def test_sigkill_at_any_moment_then_resume(
    undisturbed: Path, make_request, tmp_path: Path, run, warm: Warm, kill: int
) -> None:
    """So many kills at random moments of one capture after another; what stands is always clean, and the end is the same bytes."""
    warm.begin()  # whose start is no part of a capture, and no kill is to fall behind one
    begun = time.monotonic()
    assert run(make_request(tmp_path / "whole")) == 0
    seconds = time.monotonic() - begun
    assert tree(tmp_path / "whole") == tree(undisturbed)
    out, rng, kills, stages = tmp_path / "killed", random.Random(11), 0, set()
    for attempt in range(3 * kill):  # a later capture may be faster than the measured one: the first kills come early
        status = run(make_request(out), kill_after=rng.uniform(0, seconds * (attempt % kill + 1) / kill))
        kills += status == -signal.SIGKILL
        stages.add(len(tree(out)) if out.exists() else 0)
        if (out / "manifest.json").exists():
            assert [p for p in check_if_open(out) if "not captured yet" not in p.what] == []
        if kills >= kill:
            break
        if status == 0:
            shutil.rmtree(out)  # it was done: begin again, so that kills fall on every stage of a capture
    assert kills >= kill
    assert len(stages) >= min(3, kill - 1), "the kills all fell on the same moment"
    assert run(make_request(out)) == 0
    left = {name: data for name, data in tree(out).items() if name in tree(undisturbed)}
    assert left == tree(undisturbed)
    collect_garbage(TeacherCache(str(out)), remove=True)
    assert tree(out) == tree(undisturbed)
    assert not list((out / ".staging").iterdir())


def check_if_open(out: Path) -> list:
    try:
        return check(TeacherCache(str(out)))
    except CacheError as error:  # killed between a field's folder and its description
        assert "field.json: damaged or missing" in str(error)
        return []


def test_kills_between_any_two_writes(undisturbed: Path, make_request, tmp_path: Path, monkeypatch) -> None:
    """The same without chance: the process dies (an exception that nothing catches) after its n-th file, for every n."""

    class Killed(BaseException):
        pass

    out = tmp_path / "killed"
    real = {name: getattr(Storage, name) for name in ("put_file", "put_new")}
    budget = 0

    def dying(name: str) -> Callable:
        def write(self, *arguments):
            nonlocal budget
            if budget == 0:
                raise Killed
            budget -= 1
            return real[name](self, *arguments)

        return write

    monkeypatch.setattr(
        "teacher_cache.shards.writer.ShardWriter.abandon", lambda self: None
    )  # the dead clean nothing up
    for name in real:
        monkeypatch.setattr(Storage, name, dying(name))
    deaths = 0
    for _ in range(200):
        budget = 7
        try:
            capture(make_request(out, shards=3, fields=("vision_topk", "response_hidden")))
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert check(TeacherCache(str(out))) == []
    collect_garbage(TeacherCache(str(out)), remove=True)
    assert not list((out / ".staging").iterdir())
    once = tmp_path / "once"
    budget = 10_000
    capture(make_request(once, shards=3, fields=("vision_topk", "response_hidden")))
    assert tree(out) == tree(once)


def test_defects_become_skip_records(world_json, make_request, tmp_path: Path) -> None:
    spec = DataSpec("sft", world_json.train, image_root=str(world_json.images))
    out = tmp_path / "c"
    summary = capture(make_request(out, data=[spec], shards=2, fields=("response_topk", "vision_hidden")))
    defects = {row for kind, rows in world_json.defects.items() if kind != "duplicate_id" for row in rows}
    for column in summary["columns"].values():
        assert column["rows"] == 24 == column["written"] + sum(column["skipped"].values())
    storage = Storage(str(out))
    skipped = [skip for shard in (0, 1) for skip in read_commit(storage, "samples", shard).skipped]
    assert {skip.ordinal for skip in skipped} == defects
    assert all(skip.place and skip.detail for skip in skipped)
    cache = TeacherCache(str(out))
    assert sum(CachedSamples(cache, ["sft"], ["vision_hidden"]).counts) == 24 - len(defects)
    assert check(cache) == []


def test_notes_of_rows_are_counted_and_shown(make_request, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    rows = [{"conversations": said}, {"conversations": said, "tools": "[{}]"}, {"conversations": said, "weight": 0.5}]
    rows += [{"conversations": said, "weight": 0}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = DataSpec("sft", str(tmp_path / "rows.json"))
    summary = capture(make_request(tmp_path / "c", data=[spec], shards=2, store="none", fields=()))
    assert summary["columns"]["samples"]["counts"]["columns_unused"] == 2
    assert summary["columns"]["samples"]["skipped"] == {"not_for_training": 1}
    text = cache_table(summary["columns"], summary["rows"])
    assert "note: 2 rows: the row has columns or keys that change training elsewhere" in text
    assert check(TeacherCache(str(tmp_path / "c"))) == []


def test_over_length_rows_are_skipped_or_cut(make_request, mixture, tmp_path: Path) -> None:
    counts = {}
    for how in ("skip", "cut"):
        out = tmp_path / how
        few = {"max_length": 80, "over_length": how, "allow_skips": 0.75}
        summary = capture(make_request(out, data=mixture[1:], shards=2, fields=("response_topk",), **few))
        for column in summary["columns"].values():
            assert column["rows"] == 21 == column["written"] + column["skipped"].get("over_length", 0)
        counts[how] = summary["columns"]["samples"]["written"]
        cache = TeacherCache(str(out))
        rows = CachedSamples(cache, ["sft"], ["response_topk"])
        for position, count in enumerate(rows.counts):
            for i in range(count):
                row = rows.read(position, i)
                assert len(row.text.ids) + 36 * len(row.layout) <= 80
                assert len(row.fields["response_topk"].ids) == len(row.text.response_ids)
    assert counts["skip"] < counts["cut"]


def test_a_teacher_that_says_nan(make_request, tiny_teacher: Path, mixture, tmp_path: Path) -> None:
    """Every row becomes a skip record of every field, while samples keeps it."""
    from transformers import AutoModelForImageTextToText

    broken = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    model = AutoModelForImageTextToText.from_pretrained(tiny_teacher)
    model.model.language_model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    model.save_pretrained(broken)
    out = tmp_path / "c"
    fields = ("response_hidden", "vision_hidden", "relation", "affinity")
    summary = capture(make_request(out, data=mixture[:1], teacher=broken, shards=2, fields=fields))
    for name, column in summary["columns"].items():
        assert column["rows"] == 10
        assert column["skipped"] == ({} if name == "samples" else {"nonfinite_teacher": 10})
    assert check(TeacherCache(str(out))) == []


def test_parts_without_fields(make_request, tmp_path: Path) -> None:
    out = tmp_path / "c"
    summary = capture(make_request(out, fields=("response_topk",), parts_without_fields=("caption",)))
    assert summary["columns"]["samples"]["rows"] == 31
    assert summary["columns"]["fields/response_topk"]["rows"] == 21
    assert check(TeacherCache(str(out))) == []
    with pytest.raises(KdcliError, match=r"captions.*the parts are caption, sft"):
        capture(make_request(tmp_path / "d", parts_without_fields=("captions",)))
    assert not (tmp_path / "d").exists()


def test_samples_alone_need_no_teacher_weights(make_request, tiny_teacher: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    (bare / "model.safetensors").write_bytes(b"not weights")
    summary = capture(make_request(tmp_path / "c", teacher=bare, store="none", fields=()))
    assert set(summary["columns"]) == {"samples"}
    assert summary["columns"]["samples"]["written"] == 31


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_length": 100}, r"preparation.max_length: cache 2048, here 100"),
        ({"seed": 3}, r"seed: cache 0, here 3"),
        ({"shards": 4}, r"slices: cache has 5, here 4"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused(tiny_cache: Path, copy_of, make_request, change, said) -> None:
    folder = copy_of(tiny_cache)
    before = tree(folder)
    with pytest.raises(CacheError, match="holds another plan") as caught:
        capture(make_request(folder, **change))
    import re

    assert re.search(said, str(caught.value))
    assert tree(folder) == before


def test_another_template_or_mixture_is_refused(tiny_cache: Path, copy_of, make_request, mixture) -> None:
    folder = copy_of(tiny_cache)
    before = tree(folder)
    for data, said in (
        ([mixture[0], replace(mixture[1], template="plain")], "parts.sft.template: cache chat, here plain"),
        ([mixture[0], replace(mixture[1], limit=20)], "parts.sft.rows: cache 21, here 20"),
        ([replace(mixture[0], part="pretrain"), mixture[1]], "parts.pretrain"),
    ):
        with pytest.raises(CacheError, match="holds another plan") as caught:
            capture(make_request(folder, data=data))
        assert said in str(caught.value)
    assert tree(folder) == before


def test_a_field_goes_on_with_the_codec_version_that_it_was_begun_with(make_request, tmp_path: Path) -> None:
    """As after an upgrade: the same command finds everything done; a version that was asked for is another setting."""
    folder, field = tmp_path / "cache", "vision_hidden"
    request = make_request(folder, codec="int8", fields=(field,))

    def of_version(version: int) -> Any:
        return replace(request, field_params={field: {"codec": "int8", "codec_version": version}})

    capture(of_version(1))
    before = tree(folder)
    capture(request)
    assert tree(folder) == before
    assert TeacherCache(str(folder)).fields[field]["params"] == {"codec": "int8", "codec_version": 1}
    (folder / f"fields/{field}/commits/000000.json").unlink()
    capture(request)
    assert tree(folder).keys() == before.keys(), "what was lost is made again, by the same version"
    with pytest.raises(CacheError, match=r"params.codec_version: cache 1, here 2"):
        capture(of_version(2))


@pytest.mark.parametrize(
    ("field", "given", "older", "version"),
    [
        ("vision_hidden", {"codec": "sketch"}, {"codec_version": 1}, 1),
        ("affinity", {"layout": "factored"}, {"codec_version": 1, "text": "all", "step": 0.02}, 1),
        ("affinity", {"layout": "factored"}, {"step": 0.02}, 2),
        ("affinity", {"layout": "dense"}, {"text": "all"}, 1),
    ],
    ids=["sketch", "factored affinity", "factored affinity of one step", "dense affinity"],
)
def test_older_versions_of_coded_fields_go_on(
    make_request, tmp_path: Path, field: str, given: dict[str, Any], older: dict[str, Any], version: int
) -> None:
    """A cache of before: described as it always was, read, found done by today's command, and mended with the bytes that stood there."""
    folder = tmp_path / "cache"
    request = replace(make_request(folder, fields=(field,)), field_params={field: given})
    capture(replace(request, field_params={field: {**given, **older}}))
    before = tree(folder)
    body = TeacherCache(str(folder)).fields[field]
    assert body["version"] == version and "long_step" not in body["params"]
    assert ("text" in body["params"]) == (version > 1)
    capture(request)
    assert tree(folder) == before
    (folder / f"fields/{field}/commits/000000.json").unlink()
    capture(request)
    assert tree(folder).keys() == before.keys()
    cache = TeacherCache(str(folder))
    row = CachedSamples(cache, cache.parts(), [field]).read(0, 0)
    read = row.fields[field]
    assert torch.isfinite(read.coefficients if field == "vision_hidden" else read).all()


def test_another_teacher_or_codec_is_refused(tiny_cache: Path, copy_of, make_request, tiny_student: Path) -> None:
    folder = copy_of(tiny_cache)
    before = tree(folder)
    with pytest.raises(CacheError, match=r"teacher.hidden_size: cache 48, here 32"):
        capture(make_request(folder, teacher=tiny_student, fields=("response_topk",)))
    with pytest.raises(CacheError, match=r"params.codec: cache fp32, here int8"):
        capture(make_request(folder, codec="int8", fields=("vision_hidden",)))
    assert tree(folder) == before


def test_another_teachers_field_beside_the_first(tiny_cache: Path, tiny_student: Path, make_request, tmp_path) -> None:
    """A field is bound to its own teacher: two fields of one cache may come from two."""
    out = tmp_path / "c"
    capture(make_request(out, fields=("vision_hidden",)))
    capture(make_request(out, fields=("response_hidden",), teacher=tiny_student))
    cache = TeacherCache(str(out))
    assert cache.teacher_head("vision_hidden").shape[1] == 48
    assert cache.teacher_head("response_hidden").shape[1] == 32
    assert check(cache) == []


def test_an_error_leaves_no_half_written_shard(make_request, tmp_path: Path, monkeypatch) -> None:
    from teacher_cache.teachers import transformers as module

    out = tmp_path / "c"

    def refuse(self, prepared, wants):
        raise CompatibilityError("no")

    monkeypatch.setattr(module.TransformersTeacher, "__call__", refuse)
    with pytest.raises(CompatibilityError):
        capture(make_request(out, fields=("vision_topk",)))
    assert not [name for name in tree(out) if "/data/" in name or "/commits/" in name]
    assert not list((out / ".staging").iterdir())


def test_inspect_speaks_words(tiny_cache: Path, tiny_cache_bf16: Path) -> None:
    cache = TeacherCache(str(tiny_cache))
    rows = CachedSamples(cache, cache.parts(), [])
    key = rows.key(len(rows.counts) - 1, 0)
    for folder in (tiny_cache, tiny_cache_bf16):
        decoded = inspect(TeacherCache(str(folder)), Asked(key=key))
        assert decoded.row.key == key
        assert len(decoded.response) == len(decoded.row.text.response_ids)
        assert all(0 <= p <= 1 for _, heads in decoded.response for _, p in heads)
        assert decoded.bytes["samples"] > 0
    with pytest.raises(CacheError, match="31 samples"):
        inspect(cache, Asked(row=31))
    with pytest.raises(CacheError, match="no sample with key"):
        inspect(cache, Asked(key="nothing"))
