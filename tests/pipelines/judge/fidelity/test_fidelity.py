"""``kdcli fidelity`` from end to end: an exact cache shows no error, damage shows, what cannot be compared is named or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pipelines.judge.fidelity import run, write_files
from pipelines.judge.fidelity.compare import LIVE
from pipelines.judge.fidelity.sources import OutputSource, check_head
from pipelines.judge.fidelity.terms import TERMS
from teacher_cache.errors import CompatibilityError, KdcliError
from tests.close import assert_all_close

VLAD = ("VLAD", "VLAD, own match")


def test_an_exact_cache_has_no_error(compared: Callable[..., Any], tiny_cache: Path) -> None:
    result = compared(tiny_cache)
    assert set(result["terms"]) == set(TERMS) and not result["unserved"]
    for name, one in result["terms"].items():
        # cosines are stored as int8 in every cache: half a step is 0.004
        rel, degrees = (5e-3, 1.0) if name in VLAD else (1e-4, 0.1)
        assert abs(one["cache"]["loss_error"]) <= rel, name
        assert one["cache"]["gradient_angle"] < degrees and one["cache"]["row_angle"]["median"] < degrees, name
        assert one["cache"]["gradient_norm_ratio"] == pytest.approx(1, abs=1e-2), name
    assert result["matching"]["cache"]["equal_pairs"] == 1.0
    assert result["matching"]["cache"]["cost_ratio"]["max"] == pytest.approx(1.0, abs=1e-9)
    assert result["distributions"]["vision: vision_hidden"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_the_noise_floor_stands_beside_it(compared: Callable[..., Any], tiny_cache: Path) -> None:
    """Another batch shape changes next to nothing, bfloat16 a little, and neither is the cache's error."""
    for one in compared(tiny_cache)["terms"].values():
        assert abs(one["one by one"]["loss_error"]) < 1e-5 and one["one by one"]["gradient_angle"] < 0.05
        assert 1e-3 < one["bfloat16"]["gradient_angle"] < 10


def test_standard_is_close_and_compact_is_not_in_reverse(
    compared: Callable[..., Any], tiny_cache_standard: Path
) -> None:
    """A random teacher's flat distributions are the worst case of a head without a sketch."""
    result = compared(tiny_cache_standard)
    assert set(result["terms"]) == set(TERMS)
    for name in ("forward KL, response", "reverse KL, vision", "RDist", "VSD"):
        assert result["terms"][name]["cache"]["gradient_angle"] < 3, name
    whole = result["distributions"]["vision: vision_topk + vision_hidden"]
    bare = result["distributions"]["vision: vision_topk"]
    assert whole["kl"]["mean"] < 0.1 * bare["kl"]["mean"]
    assert whole["reverse"]["head_angle"] < 0.1 * bare["reverse"]["head_angle"]
    assert whole["payload_per_row"] > bare["payload_per_row"] > 5


def test_memory_changes_no_number(
    compared: Callable[..., Any], tiny_cache_standard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample a forward, one term's gradients and one stored distribution at a time."""
    whole = compared(tiny_cache_standard)
    monkeypatch.setattr("pipelines.judge.fidelity.student.BATCH_TOKENS", {"cpu": 1})
    monkeypatch.setattr("pipelines.judge.fidelity.compare.MOST_BYTES", 1)
    monkeypatch.setattr("pipelines.judge.fidelity.stored.MOST_BYTES", 1)
    small = compared(tiny_cache_standard, fresh=True)
    for name, one in whole["terms"].items():
        for key in ("loss_error", "gradient_angle", "gradient_norm_ratio"):
            assert small["terms"][name]["cache"][key] == pytest.approx(one["cache"][key], rel=1e-2, abs=1e-4), (
                name,
                key,
            )
    for name, one in whole["distributions"].items():
        assert small["distributions"][name]["kl"]["mean"] == pytest.approx(one["kl"]["mean"], rel=1e-3)
        assert small["distributions"][name]["forward"]["head_angle"] == pytest.approx(
            one["forward"]["head_angle"], rel=1e-2
        )


class Shuffled(OutputSource):
    """A cache whose rows of each sample have lost their order."""

    def view(self, term: str, number: int) -> Any:
        torch.manual_seed(number)
        self.records[number] = {  # type: ignore[index]
            name: one[torch.randperm(len(one))] for name, one in self.records[number].items()
        }
        return super().view(term, number)


def test_a_damaged_target_shows(
    compared: Callable[..., Any], tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run.cache_source
    monkeypatch.setattr(
        run, "cache_source", lambda *arguments: (lambda s: Shuffled(s.signals, s.records))(exact(*arguments))
    )
    result = compared(tiny_cache, fresh=True, samples=3)
    for name in TERMS:
        assert result["terms"][name]["cache"]["row_angle"]["median"] > 5, name
    assert result["terms"]["forward KL, response"]["cache"]["gradient_angle"] > 5
    assert result["matching"]["cache"]["equal_pairs"] < 0.5
    assert result["distributions"]["vision: vision_hidden"]["kl"]["mean"] > 0.1


def test_another_teacher_is_refused(compared: Callable[..., Any], tiny_cache: Path, tiny_student: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"is not the teacher of this cache: .*hidden_size: cache 48, here 32"):
        compared(tiny_cache, teacher=tiny_student)


def test_a_teacher_of_the_same_shape_is_refused_by_its_weights(
    compared: Callable[..., Any], tiny_cache: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights[min(weights)] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match="weights: cache"):
        compared(tiny_cache, teacher=other)


def test_a_head_that_is_not_the_teachers_is_refused(tiny_cache: Path) -> None:
    from teacher_cache.reading.cache import TeacherCache

    cache = TeacherCache(str(tiny_cache))
    head = cache.teacher_head("vision_hidden")
    check_head(cache, ["vision_hidden", "vision_topk"], head)
    for wrong in (head[:-1], head + 1e-3):
        with pytest.raises(CompatibilityError, match="the head stored for vision_hidden"):
            check_head(cache, ["vision_hidden"], wrong)


def test_no_student_is_refused(compared: Callable[..., Any], tiny_cache: Path) -> None:
    with pytest.raises(KdcliError, match="give --student MODEL"):
        compared(tiny_cache, student=None)


def test_terms_that_are_not_served_are_named(
    compared: Callable[..., Any], make_request: Callable[..., Any], tmp_path: Path
) -> None:
    from pipelines.capture.cache_teacher import capture
    from pipelines.judge.fidelity.show import report

    capture(make_request(tmp_path / "cache", fields=("response_topk",)))
    result = compared(tmp_path / "cache", fresh=True, samples=3)
    assert sorted(result["terms"]) == ["JSD, response", "forward KL, response", "reverse KL, response"]
    assert result["matching"] == {} and set(result["unserved"]) == {*TERMS, "VTM"} - set(result["terms"])
    text = report(result)
    assert (
        f"RDist: not served: needs vision_relation: `kdcli cache add-field {tmp_path / 'cache'} --field vision_hidden`"
        in text
    )
    assert "VLAD: not served: needs vision_text_affinity" in text and "lower bound" in text


def test_a_student_with_other_vision_tokens_is_matched_only(
    compared: Callable[..., Any], tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.judge.fidelity.student.same_grids", lambda rows, student: False)
    result = compared(tiny_cache, fresh=True, samples=2, stage="DPT")
    aligned = {name for name, term in TERMS.items() if term.aligned}
    assert set(result["unserved"]) == aligned and set(result["terms"]) == set(TERMS) - aligned
    assert all("vision tokens are not the teacher's" in why for why in result["unserved"].values())
    assert abs(result["terms"]["VSD"]["cache"]["loss_error"]) < 1e-4, "unpooled rows are matched too"
    assert result["trained_parameters"] < 10_000, "DPT trains the projector alone"


def test_a_cache_that_serves_nothing_is_refused(
    compared: Callable[..., Any], make_request: Callable[..., Any], tmp_path: Path
) -> None:
    from pipelines.capture.cache_teacher import capture

    capture(make_request(tmp_path / "cache", fields=(), store="none"))
    with pytest.raises(KdcliError, match="no field of a teacher to compare"):
        compared(tmp_path / "cache")


def test_live_gradients_are_those_of_training(
    tiny_cache: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of every LLaVA-KD term by ``total_loss`` and one plain backward, over the same rows."""
    from pipelines.judge.fidelity import FidelityRequest, compare, fidelity
    from student_train.losses.reduce import total_loss
    from student_train.methods import create_method
    from student_train.teacher_view import TeacherView
    from teacher_cache.preparing.batch import collate
    from teacher_cache.teachers.transformers import TeacherSpec

    works: dict[str, Any] = {}
    summary = compare.TermWork.summary
    monkeypatch.setattr(compare.TermWork, "summary", lambda self: works.update({self.name: self}) or summary(self))
    request = FidelityRequest(
        str(tiny_cache), TeacherSpec(str(tiny_teacher), device="cpu"), str(tiny_student), samples=5
    )
    fidelity(request)
    student, source = works["RDist"].student, works["RDist"].sources[LIVE]
    batch = collate(student.prepared, 0)
    hidden = student.model(batch, ["response", "vision"])
    views = [{n: source.view(n, i) for n in works} for i in range(len(student))]

    def joined(kind: str) -> Any:
        each = [view[f"forward KL, {kind}"].distributions[kind] for view in views]
        return replace(each[0], hidden=torch.cat([one.hidden for one in each]))

    distributions = {kind: joined(kind) for kind in ("response", "vision")}
    relations = [view["RDist"].relations[0] for view in views]
    teacher = TeacherView(distributions, relations, views[0]["RDist"].vocabulary)
    terms = create_method("llava-kd").terms()
    for name, term in {"forward KL, response": "res", "forward KL, vision": "vis", "RDist": "rel"}.items():
        one = {term: replace(terms[term], weight=1.0)}
        count = works[name].tallies[LIVE].count
        loss, _ = total_loss(one, student.model.rows(hidden, batch), teacher, {term: float(count)})
        assert float(loss.detach()) == pytest.approx(works[name].tallies[LIVE].mean, rel=1e-5)
        expected = torch.autograd.grad(loss, student.parameters, retain_graph=True, allow_unused=True)
        pairs = [(a / count, b) for a, b in zip(works[name].gradients[LIVE], expected) if b is not None]
        assert_all_close(*map(list, zip(*pairs)), rel=1e-4)


def test_the_command_writes_json_tables_and_a_plot(
    tiny_cache_standard: Path, tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    import cli

    command = [
        "fidelity",
        "--cache",
        str(tiny_cache_standard),
        "--teacher",
        str(tiny_teacher),
        "--student",
        str(tiny_student),
    ]
    files = ["--plot", str(tmp_path / "plot.png"), "--out", str(tmp_path / "page.md")]
    done = CliRunner().invoke(
        cli.main,
        [*command, "--samples", "2", "--parts", "sft", "--device", "cpu", "--json", *files],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    keys = {"cache", "teacher", "student", "stage", "samples", "parts", "rows", "dtype", "device", "seed", "plan_hash"}
    assert set(body) == keys | {
        *("trained_parameters", "terms", "matching", "unserved", "distributions", "bytes", "sweep", "notes")
    }
    assert body["parts"] == ["sft"] and body["samples"] == 2 and body["stage"] == "DFT"
    for one in body["terms"].values():
        assert set(one) == {"fields", "rows", "live", "cache", "one by one", "bfloat16"}
        assert set(one["cache"]) == {
            *("loss", "loss_error", "row_angle", "row_norm_ratio", "gradient_angle", "gradient_norm_ratio")
        }
        assert all(math.isfinite(value) for value in one["cache"]["row_angle"].values())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.md").read_text()
    assert "| reverse KL, vision" in page and "noise" not in page and "plot.png" in page
    write_files(body, None, str(tmp_path / "all.json"))
    assert json.loads((tmp_path / "all.json").read_text()) == body


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--stage", "XYZ"], "unknown stage XYZ"),
        (["--stage", "DPT,DFT"], "one stage at a time"),
        (["--parts", "other"], "no part other"),
        (["--dtype", "float8"], "dtype 'float8'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    flags: list[str], message: str, tiny_cache: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    import cli

    command = ["fidelity", "--cache", str(tiny_cache), "--teacher", str(tiny_teacher), "--student", str(tiny_student)]
    done = CliRunner().invoke(cli.main, [*command, *flags])
    assert done.exit_code == 1 and message in done.output
    assert "Traceback" not in done.output
