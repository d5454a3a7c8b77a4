"""A whole cache: planted errors are found, the turn is named, and what cannot be read is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cli
from pipelines.capture.cache_teacher import capture
from pipelines.judge.labels import show
from pipelines.judge.labels.answers import JudgedAnswer
from pipelines.judge.labels.survey import survey
from student_train.sample_columns import answer_lengths, read_column
from student_train.selection import check_columns, parse_selector
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSample, CachedSamples
from teacher_cache.samples import TEXT
from teacher_cache.shards.storage import Storage
from tests.text_models import build_text_folder, write_rows


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.main, list(words))


def test_planted_errors_are_found(noisy: Any) -> None:
    """Of as many answers as were planted nine in ten are, at least; of those that are suspected, too; and four of five are among these."""
    url, planted = noisy
    seen: list[tuple[float, bool]] = []

    def each(row: CachedSample, answers: list[JudgedAnswer]) -> None:
        of_part = row.sample.part == "sft"
        seen.extend((one.score, of_part and (row.sample.ordinal, one.number) in planted) for one in answers)

    made = survey(TeacherCache(str(url)), each=each)
    assert sum(wrong for _, wrong in seen) == len(planted) > 40
    first = sorted(seen, reverse=True)[: len(planted)]
    assert sum(wrong for _, wrong in first) >= 0.9 * len(planted)
    suspected = [wrong for score, wrong in seen if score >= made.cut]
    assert len(suspected) == made.suspected
    assert sum(suspected) >= 0.9 * len(suspected) and sum(suspected) >= 0.8 * len(planted)
    assert abs(made.wrong - len(planted)) < 0.25 * len(planted)


def test_the_worst_name_row_turn_label_and_the_teachers_word(noisy: Any) -> None:
    url, planted = noisy
    made = survey(TeacherCache(str(url)), worst=15)
    scores = [one.answer.score for one in made.worst]
    taught = 0
    assert len(scores) == 15 and scores == sorted(scores, reverse=True)
    for one in made.worst:
        assert one.part == "sft" and one.source in ("shapes", "chart", "reading", "text", "no image")
        listed = planted[int(one.key.split("-")[0]), one.answer.number]
        assert one.label == listed["wrong"] and one.id == listed["id"] and one.answer.turn == 2 * listed["turn"] + 1
        assert one.expected != one.token and one.p_expected > 0.5 > one.p_label and one.token.strip() in one.label
        assert one.question
        taught += listed["right"].startswith(one.expected.strip())
    assert taught >= 13, "the teacher's word begins the right answer"
    assert {one.answer.number for one in made.worst} > {0, 1}, "not the first answer of a row alone"


def test_exact_hidden_states_and_the_head_of_eight_agree(tiny_cache: Path, copy_of: Callable[[Path], Path]) -> None:
    """Another field, the same answers: counts alike, nll no less where no bound stands for it."""
    topk = survey(TeacherCache(str(tiny_cache)))
    cache = copy_of(tiny_cache)
    run("cache", "drop-field", str(cache), "response_topk", "--yes")
    hidden = survey(TeacherCache(str(cache)))
    assert topk.fields == ("response_topk",) and hidden.fields == ("response_hidden",)
    for one, other in zip(topk.parts, hidden.parts):
        a, b = one.whole, other.whole
        assert (a.answers, a.tokens, a.empty) == (b.answers, b.tokens, b.empty) and a.contradicted == b.contradicted
        assert a.doubt == pytest.approx(b.doubt, rel=1e-3) and b.outside == 0 < a.outside
        assert a.nll < b.nll


def test_the_command_prints_tables_and_json(noisy: Any) -> None:
    url, planted = noisy
    printed = run("doctor", "--cache", str(url), "--worst", "3")
    assert printed.exit_code == 0, printed.output
    assert "| sft / chart" in printed.output and "The 3 answers to look at first" in printed.output
    assert "part sft: the teacher contradicts" in printed.output and "s a thousand rows" in printed.output
    body = json.loads(run("doctor", "--cache", str(url), "--worst", "3", "--parts", "sft", "--json").stdout)
    assert len(body["worst"]) == 3 and [one["part"] for one in body["parts"]] == ["sft"]
    assert body["parts"][0]["answers"] == sum(one["answers"] for one in body["parts"][0]["sources"])
    assert 0.5 * len(planted) < body["wrong"] < 1.5 * len(planted) and body["suspected"] == round(body["wrong"])


def test_the_weights_leave_suspected_answers_out(noisy: Any, tmp_path: Path) -> None:
    """A line a row, a number an answer; ``--select`` takes the file as it is."""
    url, planted = noisy
    file = tmp_path / "labels.jsonl"
    done = run("doctor", "--cache", str(url), "--parts", "sft", "--weights", str(file), "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    zeros = {(int(one["key"][:9]), n) for one in lines for n, right in enumerate(one["right"]) if not right}
    assert len(zeros) == json.loads(done.stdout)["suspected"] and len(zeros & set(planted)) >= 0.9 * len(zeros)
    rows = CachedSamples(TeacherCache(str(url)), ["sft"], ())
    select = {"reg": parse_selector("reg", f"file:{file}:right")}
    check_columns(select, rows.keys, ["sft"])
    column = read_column(f"file:{file}:right", "here")
    for number in range(rows.counts[0]):
        row = rows.read(0, number)
        value = column.of(row)
        assert isinstance(value, tuple) and len(value) == len(answer_lengths(row.text))


def test_a_field_that_tells_nothing_is_named(tiny_cache: Path, copy_of: Callable[[Path], Path]) -> None:
    cache = copy_of(tiny_cache)
    for name in ("response_topk", "response_hidden"):
        run("cache", "drop-field", str(cache), name, "--yes")
    done = run("doctor", "--cache", str(cache))
    assert done.exit_code == 1 and len(done.output.strip().splitlines()) == 1
    assert "is stored in response_topk or response_hidden; the cache has affinity" in done.output
    assert f"kdcli cache add-field {cache} --field response_topk" in done.output


def test_half_a_cache_is_half_counted(noisy: Any, copy_of: Callable[[Path], Path]) -> None:
    """Shards without the field are named as not counted, with those of a part of which none is there."""
    url, _ = noisy
    whole = survey(TeacherCache(str(url)))
    copy = copy_of(url)
    cache = TeacherCache(str(copy))
    for shard in [*cache.shards(["sft"])[:1], *cache.shards(["caption"])]:
        (copy / "fields" / "response_topk" / "commits" / f"{shard:06d}.json").unlink()
    made = survey(TeacherCache(str(copy)))
    caption, sft = made.parts
    assert sft.shards == (whole.parts[1].shards[1] - 1, whole.parts[1].shards[1]) and 0 < sft.rows < whole.parts[1].rows
    assert caption.rows == 0 and caption.sources == {}
    text = show.report(made)
    assert f"note: part sft: {sft.shards[0]} of {sft.shards[1]} shards have samples and response_topk" in text
    assert "part caption: the teacher" not in text and "\n| caption " in text


def test_damage_is_named_by_shard_and_pictures_are_not_read(noisy: Any, copy_of: Callable[[Path], Path]) -> None:
    url, _ = noisy
    copy = copy_of(url)
    cache = TeacherCache(str(copy))
    for column, member in (("samples", None), ("fields/response_topk", ".safetensors")):
        reader = cache.column(column.rpartition("/")[2])
        entry = reader.entries(0)[0]
        one = next(m for m in entry.members if (m.ext not in TEXT if member is None else True))
        (tar,) = (copy / column / "data").glob("000000-*.tar")
        data = bytearray(tar.read_bytes())
        data[one.offset + one.size // 2] ^= 1
        tar.write_bytes(data)
        if member is None:
            assert survey(TeacherCache(str(copy))).rows == 84, "the damaged picture is not looked at"
            with pytest.raises(CacheError, match="fails its checksum"):
                CachedSamples(cache, cache.parts(), ()).read(0, 0)
    with pytest.raises(CacheError, match="shard 000000 of fields/response_topk is damaged"):
        survey(TeacherCache(str(copy)))


def test_a_text_only_cache(tmp_path: Path, make_request: Callable[..., Any]) -> None:
    from teacher_cache.sources import DataSpec

    teacher = build_text_folder(tmp_path / "teacher")
    write_rows(tmp_path / "rows.jsonl", 12)
    data = [DataSpec("sft", str(tmp_path / "rows.jsonl"))]
    capture(make_request(tmp_path / "cache", data=data, teacher=teacher, shards=2, fields=("response_topk",)))
    made = survey(TeacherCache(str(tmp_path / "cache")))
    (part,) = made.parts
    assert made.rows == 12 and list(part.sources) == ["no image"] and 0 < part.whole.answers < 30
    assert f"part sft: {part.whole.answers} answers were checked, too few to judge" in show.report(made)


@pytest.mark.usefixtures("healthy", "one_thread")
def test_a_cache_in_a_bucket_says_the_same(noisy: Any) -> None:
    url, _ = noisy
    there = Storage("s3://bucket/noisy")
    for file in (one for one in Path(url).rglob("*") if one.is_file()):
        there.put_bytes(file.read_bytes(), str(file.relative_to(url)))
    local, remote = (show.to_json(survey(TeacherCache(place))) for place in (str(url), "s3://bucket/noisy"))
    for one in (local, remote):
        del one["cache"], one["seconds"]
    assert local == remote


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cache", "c", "rows.json"), "--cache checks the labels of a cache, PATHS the files"),
        (("--cache", "c", "--strict", "0.1"), "--strict the files of a mixture"),
        (("rows.json", "--worst", "3"), "--worst applies to the labels of a cache: name the cache with --cache"),
        (("--weights", "w.jsonl"), "--weights applies to the labels"),
    ],
)
def test_flags_of_the_other_doctor_are_refused(words: tuple[str, ...], says: str) -> None:
    done = run("doctor", *words)
    assert done.exit_code == 1 and says in done.output, done.output


def test_an_unknown_part_is_refused(tiny_cache: Path) -> None:
    with pytest.raises(KdcliError, match="no part nobody"):
        survey(TeacherCache(str(tiny_cache)), parts=["nobody"])
