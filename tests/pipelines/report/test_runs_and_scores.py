"""Run folders and results: what is read, what is averaged, what is refused."""

from __future__ import annotations

import json

import pytest

from pipelines.report.runs import read_runs
from pipelines.report.scores import collect_results, score_rows
from teacher_cache.errors import KdcliError


def result(value: float, **families: float) -> dict:
    found = {name: {"n": 10, "exact_match": one} for name, one in (families or {"charts": value}).items()}
    return {"n": 10 * len(found), "exact_match": value, "family_mean": value, "families": found}


def test_a_folder_of_runs_stands_for_the_runs_in_it(make_run, tmp_path):
    make_run("sft"), make_run("llava-kd/seed-0"), make_run("llava-kd/seed-1")
    runs = read_runs([tmp_path / "runs"])
    assert [(run.name, run.group) for run in runs] == [
        ("llava-kd/seed-0", "llava-kd"),
        ("llava-kd/seed-1", "llava-kd"),
        ("sft", "sft"),
    ]


def test_names_grow_until_runs_differ(make_run):
    folders = [make_run("a/kd"), make_run("b/kd")]
    assert [run.name for run in read_runs(folders)] == ["a/kd", "b/kd"]


def test_time_and_tokens_count_steps_that_were_not_logged(make_run):
    folder = make_run("kd", steps=4)
    (folder / "01-DFT" / "done.json").write_text(json.dumps({"result": {"steps": 40, "samples": 320}}))
    (run,) = read_runs([folder])
    assert (run.seconds, run.tokens) == (20.0, 4000.0)


def test_a_half_written_last_line_is_a_run_that_goes_on(make_run):
    folder = make_run("kd")
    with (folder / "01-DFT" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    (folder / "01-DFT" / "done.json").unlink()
    (stage,) = read_runs([folder])[0].stages
    assert len(stage.points) == 4 and stage.steps == 4 and not stage.done


def test_damage_before_the_last_line_is_named(make_run):
    folder = make_run("kd")
    log = folder / "01-DFT" / "metrics.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(KdcliError, match=r"metrics.jsonl: line 1"):
        read_runs([folder])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(KdcliError, match=r"run\.json"):
        read_runs([tmp_path])


def test_several_seeds_become_mean_and_sample_deviation():
    table = score_rows(collect_results([], {"kd": [result(0.5), result(0.6), result(0.7)], "sft": result(0.4)}))
    assert table.names == ["kd", "sft"] and table.seeds == [3, 1]
    assert [str(cell) for cell in table.summary] == ["60.0 ± 10.0", "40.0"]


def cells_of(table):
    return {family: cells for family, _, cells in table.rows}


def test_questions_that_were_not_asked_are_shown():
    """Of a file with 12 rows both models answered 10; of another file the student answered fewer."""
    scores = {"teacher": {**result(0.9), "n": 10, "skipped": {"no_answer": 2}}, "kd": {**result(0.5), "n": 10}}
    scores["kd"]["skipped"] = {"image_missing": 1, "no_answer": 1}
    table = score_rows(collect_results([], scores))
    assert table.uncounted == [
        "teacher: 10 of 12 rows asked, 2 skipped: 2 no_answer",
        "kd: 10 of 12 rows asked, 2 skipped: 1 image_missing, 1 no_answer",
    ]
    scores["kd"] |= {"n": 9, "skipped": {}}
    table = score_rows(collect_results([], scores))
    assert {family: asked for family, asked, _ in table.rows}["all questions"] == "10 / 9"


def test_the_teacher_comes_first_and_is_no_competitor():
    scores = {"sft": result(0.4), "kd": result(0.5), "teacher": result(0.9)}
    table = score_rows(collect_results([], scores))
    assert table.names == ["teacher", "sft", "kd"]
    charts = cells_of(table)["charts"]
    assert [cell.best for cell in charts] == [False, False, True]


def test_one_student_alone_is_not_best_and_a_missing_family_is_a_gap():
    table = score_rows({"teacher": [result(0.9, charts=0.9, text=0.9)], "kd": [result(0.5, charts=0.5)]})
    rows = cells_of(table)
    assert rows["text"][1] is None and not rows["charts"][1].best


def test_scores_come_from_run_folders_once_and_the_caller_wins(make_run):
    first, second = make_run("kd-seed0"), make_run("kd-seed1")
    (first / "scores.json").write_text(json.dumps({"teacher": result(0.9), "kd": result(0.5)}))
    (second / "scores.json").write_text(json.dumps({"teacher": result(0.9), "kd": result(0.7)}))
    runs = read_runs([first, second])
    assert [len(one) for one in collect_results(runs, None).values()] == [1, 2]
    assert collect_results(runs, {"kd": result(0.1)})["kd"] == [result(0.1)]


def test_a_bare_result_belongs_to_the_group_of_its_run(make_run):
    folders = [make_run("kd-seed0"), make_run("kd-seed1")]
    for folder, value in zip(folders, (0.5, 0.7)):
        (folder / "scores.json").write_text(json.dumps(result(value)))
    assert [str(cell) for cell in score_rows(collect_results(read_runs(folders), None)).summary] == ["60.0 ± 14.1"]


def test_scores_of_another_shape_are_refused():
    with pytest.raises(KdcliError, match=r"kd.*kdcli eval"):
        collect_results([], {"kd": {"accuracy": 0.5}})
