"""Records that a run left, damaged, edited or exchanged: a page, or one line that names the file; never anything else, and no waiting."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.export.card import model_card
from pipelines.export.provenance import find_model, read_provenance, trained_template
from pipelines.report.fidelity_files import read_fidelity
from pipelines.report.frontier import frontiers
from pipelines.report.page import write_report
from pipelines.report.runs import read_runs
from pipelines.train.run_records import MOST_BYTES, read_points
from teacher_cache.errors import KdcliError
from tests.odd_json import BYTES, odd_documents
from tests.pipelines.report.conftest import result

many = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
RECORDS = ("run.json", "03-DFT/done.json", "scores.json")


@pytest.fixture(scope="session")
def real_run(em_kd_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with scores beside it; private, so that records can be exchanged."""
    folder = tmp_path_factory.mktemp("odd") / "em-kd"
    shutil.copytree(em_kd_run, folder)
    (folder / "scores.json").write_text(json.dumps({"em-kd": {**result(0.5), "nll": 2.0, "skipped": {"no_answer": 2}}}))
    return folder


def stage_of(run: Path) -> Path:
    return next(run.glob("*/done.json")).parent


def record(run: Path, name: str) -> Path:
    return stage_of(run) / name.partition("/")[2] if "/" in name else run / name


def own_errors_only(place: Path, act: Callable[[], Any]) -> None:
    """It goes well, or one line names the file, or the run whose records do not fit each other."""
    try:
        act()
    except KdcliError as error:
        assert str(place) in str(error) and len(str(error)) < 3000, str(error)


def read_everything(run: Path, out: Path) -> None:
    """Every reader of a run's records that needs no model."""
    write_report([run], None, out, matching=False)
    model = find_model(run)
    trained_template(str(model))
    model_card(read_provenance(model, None), None, "float32", "name", "llava")


@pytest.mark.parametrize("name", RECORDS)
@many
@given(data=st.data())
def test_any_value_anywhere(real_run: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    path = record(real_run, name)
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(odd_documents(json.loads(whole))))
        own_errors_only(real_run, lambda: read_everything(real_run, tmp_path_factory.getbasetemp() / "odd.html"))
    finally:
        path.write_bytes(whole)


@many
@given(data=st.data())
def test_any_line_of_the_metrics(real_run: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = stage_of(real_run) / "metrics.jsonl"
    whole = path.read_bytes()
    line = data.draw(odd_documents(json.loads(whole.splitlines()[0])) | BYTES)
    try:
        path.write_bytes(whole + line + b"\n" + data.draw(st.sampled_from([b"", whole])))
        own_errors_only(real_run, lambda: read_everything(real_run, tmp_path_factory.getbasetemp() / "odd.html"))
    finally:
        path.write_bytes(whole)


CANDIDATE = {
    "kind": "vision",
    "label": "8 + sketch",
    "error": "",
    "kl": 0.1,
    "bytes_per_row": 9.0,
    "head_angles": {"forward": 0.5},
    "fields": {"vision_topk": {"k": 8}, "vision_hidden": {"codec": "sketch"}},
}
TERM = {"fields": ["vision_topk"], "loss_error": 0.1, "gradient_angle": 1.0, "floor_error": None, "floor_angle": None}
PREFLIGHT = {
    "choices": [{"label": "8 + sketch", "ladder": [CANDIDATE, {**CANDIDATE, "label": "50", "bytes_per_row": 20.0}]}],
    "methods": [{"method": "llava-kd", "terms": {"VSD": TERM}}],
}


@pytest.mark.parametrize("kind", ["fidelity", "preflight"])
@many
@given(data=st.data())
def test_any_measurement(fidelity_file: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "odd-measured.json"
    body = json.loads(fidelity_file.read_text()) if kind == "fidelity" else PREFLIGHT
    path.write_bytes(json.dumps(body).encode())
    assert frontiers(read_fidelity([path]))[0].rows
    path.write_bytes(data.draw(odd_documents(body)))
    own_errors_only(path, lambda: frontiers(read_fidelity([path])))


def test_a_real_run_is_read(real_run: Path, tmp_path: Path) -> None:
    read_everything(real_run, tmp_path / "report.html")
    assert "em-kd" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("tail", [b'{"step": 9, "lo', b"\xff\xfe", b"\0" * 512, b'{"step": 9'])
def test_a_last_line_that_was_cut_is_none_yet(make_run: Callable[..., Path], tail: bytes) -> None:
    log = make_run("kd") / "01-DFT" / "metrics.jsonl"
    whole = read_points(log)
    log.write_bytes(log.read_bytes() + tail)
    assert read_points(log) == whole and len(whole) == 4
    log.write_bytes(log.read_bytes() + b"\n")
    with pytest.raises(KdcliError, match=r"metrics\.jsonl: line 5 is damaged .*: remove that line"):
        read_runs([log.parents[1]])


def test_a_run_that_diverged_is_shown(make_run: Callable[..., Path], tmp_path: Path) -> None:
    log = make_run("kd") / "01-DFT" / "metrics.jsonl"
    more = ['{"step": 4, "loss": NaN, "seconds": 1}', '{"step": 5, "loss": Infinity}', '{"step": 6, "loss": 1e300}']
    log.write_text(log.read_text() + "\n".join(more) + "\n")
    assert "gap" in write_report([log.parents[1]], None, tmp_path / "r.html").read_text()
    scores = {
        "families": {"a": {"n": 1, "exact_match": 0.5, "nll": float("nan")}},
        "family_mean": 0.5,
        "exact_match": 0.5,
    }
    (log.parents[1] / "scores.json").write_text(json.dumps({**scores, "nll": float("inf")}))
    assert read_runs([log.parents[1]])[0].scores["kd"]["nll"] is None, "what Python writes of it, no JSON knows"


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a link to nothing", "far too large"])
@pytest.mark.parametrize("name", ["run.json", "01-DFT/metrics.jsonl", "01-DFT/done.json", "scores.json"])
def test_something_else_in_its_place(make_run: Callable[..., Path], tmp_path: Path, name: str, kind: str) -> None:
    run = make_run("kd")
    path = run / name
    if (name, kind) == ("01-DFT/metrics.jsonl", "a link to nothing"):
        return  # a stage that has logged nothing
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "far too large":
        with path.open("wb") as sparse:
            sparse.truncate(MOST_BYTES + 1)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "nothing")
    with pytest.raises(KdcliError) as caught:
        write_report([run], None, tmp_path / "r.html")
    assert str(path) in str(caught.value)


def test_the_name_of_a_stage_leads_nowhere(make_run: Callable[..., Path]) -> None:
    run = make_run("kd", stages=[{"stage": "/../../etc", "method": "kd"}])
    with pytest.raises(KdcliError, match=r"run\.json: stage '/../../etc' is not the name"):
        find_model(run)
