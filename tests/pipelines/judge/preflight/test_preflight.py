"""The whole of ``kdcli preflight`` on the tiny world, and the real job that goes by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.capture import fit_fields
from pipelines.capture.cache_teacher import capture
from pipelines.capture.worker import CaptureRequest
from pipelines.edit.fields import drop_field
from pipelines.inspect.cache import check
from pipelines.judge.preflight.report import TRIED, label_lines, place_of_choice, report
from pipelines.judge.preflight.request import NOTEBOOK, Notebook, PreflightRequest
from pipelines.judge.preflight.run import look_at_labels, preflight
from pipelines.judge.preflight.sample import held_out
from pipelines.settings import load_settings
from pipelines.train.run_records import finite
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.teachers.transformers import TransformersTeacher

Ask = Callable[..., PreflightRequest]


def test_go_says_what_was_chosen_and_why(flown: Any) -> None:
    _, result = flown
    assert result["go"] and not result["reasons"] and not result["warnings"]
    assert result["rows"]["written"] + sum(result["rows"]["skipped"].values()) == result["rows"]["sampled"]
    held = held_out(TeacherCache(result["cache"]).plan)
    assert len(held) == 2 and 0 < result["rows"]["judged"] <= result["rows"]["sampled"] // 3 + 2
    for choice in result["choices"]:
        chosen = next(one for one in choice["ladder"] if one["label"] == choice["label"])
        assert chosen["kl"] <= 0.005 and max(chosen["angles"].values()) <= 1.0
        assert chosen["bytes_per_row"] > 0 and not chosen["error"]
    terms = {name for one in result["methods"] for name in one["terms"]}
    assert terms == {"forward KL, response", "forward KL, vision", "RDist"}
    assert all(one["step"]["seconds"] > 0 and one["step"]["peak_bytes"] > 1e6 for one in result["methods"])
    assert result["estimate"]["bytes"] > 0 and result["tokens_per_second"] > 0
    text = report(result)
    assert text.startswith("GO\n") and "Whole job: 54 rows" in text
    assert "\nChosen: " in text and "° from the live gradient, " in text and "\nNext step up: " in text
    at, steps = place_of_choice(result), result["frontier"]
    assert steps[at]["measured"] and steps[at]["angle"] <= 1.0 and steps[at]["kl"] <= 0.005
    assert all(one["angle"] > 1.0 or one["kl"] > 0.005 for one in steps[:at]), "cheaper ones are not near enough"
    tried = (Path(result["out"]) / TRIED).read_text()
    assert "| **top-" in tried and "\n## Labels\n" in tried and "answers to look at first:" in tried
    assert [one["part"] for one in result["labels"]["parts"]] == ["caption", "sft"] and result["labels"]["rows"] > 40
    (said,) = [line for line in text.splitlines() if line.startswith("- part sft: ")]
    assert "the teacher contradicts" in said and said[2:] in result["labels"]["advice"]
    json.dumps(finite(result), allow_nan=False)


def test_labels_without_an_end_stand_under_the_verdict(
    ask: Ask, preflight_data: Any, endless_teacher: Path, tmp_path: Path
) -> None:
    """Whatever the verdict is: here the student's own template ends its answers, so no row is alike and no weights are loaded."""
    request = ask(tmp_path / "preflight", data=preflight_data[1:], stage_parts={"PT": ("sft",), "DPT": ("sft",)})
    result = preflight(replace(request, teacher=replace(request.teacher, id=str(endless_teacher))))
    (line,) = result["warnings"]
    assert "part 'sft'" in line and "no label ends an answer" in line
    assert f"\n- WARNING: {line}" in report(finite(result))


def test_a_profile_that_tells_nothing_of_labels_is_no_obstacle(
    tiny_cache: Path, copy_of: Callable[[Path], Path]
) -> None:
    cache = copy_of(tiny_cache)
    for name in ("response_topk", "response_hidden"):
        drop_field(str(cache), name, remove=True)
    found, page = look_at_labels(TeacherCache(str(cache)))
    assert "response_topk or response_hidden" in found["error"] and page == ""
    assert label_lines({"labels": found, "out": "there"}).startswith("Labels were not checked: ")


def test_its_cache_is_a_cache(flown: Any) -> None:
    """Every other command works on it, and a damaged canary file is seen."""
    cache = TeacherCache(flown[1]["cache"])
    assert check(cache) == []
    for choice in flown[1]["choices"]:
        for name, params in choice["fields"].items():
            assert params.items() <= cache.fields[name]["params"].items()


def test_verify_sees_a_damaged_canary(flown: Any, copy_of: Callable[[Path], Path]) -> None:
    cache = copy_of(flown[0] / "preflight" / "cache")
    (file,) = cache.glob("teacher/*/canaries.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert [one.what for one in check(TeacherCache(str(cache))) if "canaries" in one.what]


def test_kd_toml_keeps_its_comments(flown: Any) -> None:
    text = (flown[0] / "kd.toml").read_text()
    assert (
        text.startswith("# my job\n") and "# a guess" in text and "# of the teacher" in text and "# workers = 0" in text
    )
    settings = load_settings(flown[0] / "kd.toml")
    assert settings.capture.calibration == flown[1]["cache"] and settings.capture.shards == 5
    chosen = {name: params for choice in flown[1]["choices"] for name, params in choice["fields"].items()}
    assert settings.fields == chosen
    assert "+calibration" in flown[1]["kd_toml"]["diff"]


def real_job(flown: Any, ask: Ask, out: Path, **settings: Any) -> CaptureRequest:
    """The job as kd.toml now says it."""
    request, body = ask(out), load_settings(flown[0] / "kd.toml")
    capture = replace(request.settings.capture, calibration=body.capture.calibration, **settings)
    return CaptureRequest(request.teacher, request.data, str(out), capture, body.fields)


def test_the_real_job_takes_the_calibration_and_asks_the_canaries(flown: Any, ask: Ask, tmp_path: Path) -> None:
    summary = capture(real_job(flown, ask, tmp_path / "cache"))
    assert "answered as at preflight" in summary["notes"][0]
    there, here = TeacherCache(flown[1]["cache"]), TeacherCache(str(tmp_path / "cache"))
    for name, body in here.fields.items():
        assert body["calibration"]["sha256"] == there.fields[name]["calibration"]["sha256"]
        assert body.get("low_rank_head") == there.fields[name].get("low_rank_head")
    assert list((tmp_path / "cache").glob("teacher/*/canaries.json")) and check(here) == []
    assert "notes" not in capture(real_job(flown, ask, tmp_path / "cache")), "nothing left: nobody is asked"


def test_a_teacher_that_answers_otherwise_is_refused(
    flown: Any, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Perturbed(TransformersTeacher):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            for parameter in self.model.model.language_model.layers.parameters():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))

    monkeypatch.setattr(fit_fields, "open_teacher", Perturbed)
    with pytest.raises(CompatibilityError, match="differs from the preflight's: relative difference"):
        capture(real_job(flown, ask, tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("samples/commits/*"))


def test_another_teachers_calibration_is_refused(flown: Any, ask: Ask, tmp_path: Path, tiny_student: Path) -> None:
    job = real_job(flown, ask, tmp_path / "cache")
    with pytest.raises(
        CompatibilityError, match=r"fitted with other settings: .*teacher\.weights: there .*--calibration ''"
    ):
        capture(replace(job, teacher=replace(job.teacher, id=str(tiny_student))))
    assert not (tmp_path / "cache").exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("params", "fields", "message"),
    [
        (
            {"vision_hidden": {"codec": "sketch", "step": 0.5}},
            ("vision_hidden",),
            r"params\.step: there 0\.\d+, here 0\.5",
        ),
        ({}, ("vision_sampled", "relation", "response_topk"), "field response_topk was fitted with other settings"),
    ],
)
def test_another_fields_calibration_is_refused(
    flown: Any, ask: Ask, tmp_path: Path, params: Any, fields: tuple[str, ...], message: str
) -> None:
    job = real_job(flown, ask, tmp_path / "cache", fields=fields)
    with pytest.raises(CompatibilityError, match=message):
        capture(replace(job, field_params=params))


def test_a_damaged_calibration_is_refused(flown: Any, ask: Ask, tmp_path: Path, copy_of: Any) -> None:
    cache = copy_of(flown[0] / "preflight" / "cache")
    for file in cache.glob("teacher/*/calibration/vision_hidden-calibration-*"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match="checksum"):
        job = real_job(flown, ask, tmp_path / "cache")
        capture(replace(job, settings=replace(job.settings, calibration=str(cache))))


def test_a_calibration_of_too_few_rows_is_refused(
    flown: Any, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.capture.adopt_calibration.LEAST_ROWS", 1 << 20)
    with pytest.raises(CompatibilityError, match=r"fitted on .* token rows, at least 1048576 are needed"):
        capture(real_job(flown, ask, tmp_path / "cache"))


def test_a_rerun_reuses_and_other_settings_are_refused(
    flown: Any, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(flown[0] / "preflight", tmp_path / "preflight"))
    commits = sorted(folder.glob("cache/*/commits/*.json"))
    before = [one.stat().st_mtime_ns for one in commits]
    again = preflight(ask(folder))
    assert again["go"] and again["choices"] == as_plain(flown[1]["choices"])
    assert before == [one.stat().st_mtime_ns for one in commits]
    assert "put this into kd.toml" in report(again)
    with pytest.raises(
        CacheError, match=r"holds another preflight: budget\.max_kl: there None, here 0\.1: choose another --out"
    ):
        preflight(ask(folder, max_kl=0.1))
    read: list[Any] = []
    monkeypatch.setattr("pipelines.judge.preflight.sample.read_rows", lambda *asked: read.append(asked))
    with pytest.raises(CacheError, match=r"holds another preflight: rows: there 48, here 24: choose another --out"):
        preflight(ask(folder, rows=24))
    assert not read


def test_a_folder_is_another_preflight_s_with_and_without_its_rows(tmp_path: Path) -> None:
    """What is known before the rows are read is looked at then; notebooks of older versions do not tell how many were asked for."""
    asked, out = {"rows": 48, "budget": {"max_kl": None}}, str(tmp_path)
    Notebook(out, asked, "abc").note("choices", [])
    assert Notebook(out, asked).found == Notebook(out, asked, "abc").found == {"choices": []}
    for other, rows, message in (
        ({**asked, "rows": 24}, None, "rows: there 48, here 24"),
        (asked, "def", "plan_hash: there abc, here def"),
        ({"rows": 48, "budget": {"max_kl": 0.1}}, None, r"budget\.max_kl: there None, here 0\.1"),
    ):
        with pytest.raises(CacheError, match=f"holds another preflight: {message}: choose another --out"):
            Notebook(out, other, rows)
    older = unseal((tmp_path / NOTEBOOK).read_bytes(), "")
    del older["identity"]["rows"]
    (tmp_path / NOTEBOOK).write_bytes(seal(older))
    Notebook(out, {**asked, "rows": 24})
    assert Notebook(out, asked, "abc").found == {"choices": []}


def as_plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_no_go_where_nothing_is_fine_enough(ask: Ask, tmp_path: Path) -> None:
    kd_file = tmp_path / "kd.toml"
    kd_file.write_text("")
    result = preflight(ask(tmp_path / "out", fidelity=1e-9, methods=("kd",), rows=12, kd_file=kd_file))
    assert not result["go"] and report(result).startswith("NO-GO\n")
    assert any("no measured setting meets --fidelity 1e-09: closest are" in one for one in result["reasons"])
    assert kd_file.read_text() == "" and result["kd_toml"] is None


def test_no_go_where_a_need_is_unserved(ask: Ask, tmp_path: Path) -> None:
    only = {"fields": ("response_topk",), "shards": 4}
    result = preflight(ask(tmp_path / "out", capture=only, methods=("llava-kd",), rows=12))
    assert not result["go"]
    for need in ("vision_logits", "vision_relation"):
        assert any(f"needs {need}" in reason and "add-field" in reason for reason in result["reasons"])
    assert result["methods"][0]["terms"].keys() == {"forward KL, response"}


def test_no_go_where_the_student_has_another_tokenizer(ask: Ask, tmp_path: Path, tiny_student: Path) -> None:
    other = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    body = json.loads((other / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(body))
    result = preflight(ask(tmp_path / "out", train={"student": str(other)}))
    assert not result["go"] and "another tokenizer" in result["reasons"][0] and report(result).startswith("NO-GO")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rows": 3}, "--rows must be at least 12"),
        ({"fidelity": 0.0}, "--fidelity must be above 0"),
        ({"max_kl": -1.0}, "--max-kl must be above 0"),
        ({"bytes_per_token": 0}, "--bytes-per-token must be above 0"),
        ({"fidelity": 1.0, "bytes_per_token": 60}, "--fidelity and --bytes-per-token are two budgets: give one"),
        ({"gpus": 0}, "--gpus must be at least 1"),
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("nonsense",)}, "unknown method 'nonsense': choose from"),
        ({"train": {"student": ""}}, "no student"),
        (
            {"stage_parts": {"DPT": ("talk",)}},
            "llava-kd: stage DPT trains on part talk, and the mixture has caption, sft: name its parts",
        ),
        ({"train": {"student": "/no/such"}}, "cannot be loaded"),
        ({"capture": {"store": "tiny"}}, "--store 'tiny': choose from"),
        ({"capture": {"shards": 512}}, "--shards 512 is more than the 54 rows of the mixture: use at most --shards 54"),
        ({"capture": {"shards": 1}}, "so 2 parts need at least that many shards"),
        ({"capture": {"parts_without_fields": ("x",)}}, "parts_without_fields names x"),
    ],
)
def test_bad_input_is_one_line(ask: Ask, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(KdcliError) as caught:
        preflight(ask(tmp_path / "out", **asked))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_grids_refuse_the_row_aligned_method_alone(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import conftest

    monkeypatch.setattr(conftest, "IMAGE_SIZE", 64)
    monkeypatch.setattr(conftest, "VISION_TOKENS", 16)
    student = conftest.build_folder(tmp_path / "student", text_width=32, vision_width=24, seed=2)
    result = preflight(ask(tmp_path / "out", rows=12, train={"student": str(student)}))
    assert [bool(one["reasons"]) for one in result["methods"]] == [True, False]
    assert any("llava-kd" in reason and "vision grids differ" in reason for reason in result["reasons"])
    vision = next(choice for choice in result["choices"] if choice["kind"] == "vision")
    chosen = next(one for one in vision["ladder"] if one["label"] == vision["label"])
    assert 0 <= chosen["kl"] <= 0.005 and not chosen["angles"], "without aligned rows the distributions alone decide"


def test_a_compressed_student_is_judged_as_it_would_train(ask: Ask, tmp_path: Path) -> None:
    result = preflight(ask(tmp_path / "out", rows=12, train={"compressor": "adaptive_pool"}))
    assert [bool(one["reasons"]) for one in result["methods"]] == [True, False]
    assert any("llava-kd compares" in reason and "--method em-kd" in reason for reason in result["reasons"])
    (kd,) = (one for one in result["methods"] if one["method"] == "kd")
    assert kd["step"]["tokens"] > 0


def test_rows_that_training_would_stop_at_are_named(ask: Ask, tmp_path: Path) -> None:
    only = {"fields": ("response_topk",), "shards": 4}
    result = preflight(ask(tmp_path / "out", capture=only, methods=("kd",), rows=12, train={"max_length": 60}))
    assert not result["go"] and any("over [train] max_length = 60" in reason for reason in result["reasons"])


def test_the_command_line(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path, preflight_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A no-go is exit status 1 with its JSON on standard output; an error is one line."""
    from click.testing import CliRunner

    import cli

    monkeypatch.chdir(tmp_path)
    caption, _ = preflight_data
    Path("kd.toml").write_text("".join(f"[stages.{name}]\nparts = ['caption']\n" for name in ("SFT", "DFT")))
    words = ["preflight", "--teacher", str(tiny_teacher), "--student", str(tiny_student), "--device", "cpu"]
    words += ["--data", caption.path, "--image-root", caption.image_root, "--template", "plain", "--part", "caption"]
    words += ["--fields", "response_topk", "--shards", "2", "--methods", "llava-kd", "--json"]
    result = CliRunner().invoke(cli.main, [*words, "--rows", "12"])
    body = json.loads(result.stdout)
    assert result.exit_code == 1 and body["go"] is False and "add-field" in " ".join(body["reasons"])
    result = CliRunner().invoke(cli.main, [*words, "--rows", "2"])
    assert result.exit_code == 1 and "--rows must be at least 12" in result.output


def test_methods_whose_needs_no_measured_term_stands_for(ask: Ask, tmp_path: Path) -> None:
    """Hidden states and first-layer attention are served or named as missing; only their logits are measured on the ladder."""
    fields = {"fields": ("response_hidden", "vision_features", "attention"), "shards": 4}
    request = ask(tmp_path / "out", capture=fields, methods=("align-kd", "llavadi", "em-kd"), rows=12)
    found = {one["method"]: one for one in preflight(request)["methods"]}
    assert not found["align-kd"]["reasons"] and not found["llavadi"]["reasons"]
    assert found["align-kd"]["served"]["text_vision_attention"] == ["attention"] and found["align-kd"]["step"]
    assert "add-field" in " ".join(found["em-kd"]["reasons"])
