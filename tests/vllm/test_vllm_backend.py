"""vLLM itself against transformers on the same tiny model, and the contract that the ordinary tests replay without vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import cli
from teacher_cache.codecs import container
from teacher_cache.errors import CompatibilityError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Prepared, Sample, TeacherOutput
from teacher_cache.sources import open_source
from teacher_cache.teachers.backends import load_head, load_processor, open_teacher, teacher_fingerprint
from teacher_cache.teachers.transformers import TeacherSpec
from teacher_cache.teachers.vllm import VllmTeacher
from teacher_cache.teachers.vllm_engine import vllm_version
from teacher_cache.wants import Wants
from tests.contracts.vllm_rows import (
    BOUND,
    RECORDED,
    VERSIONS,
    WANTS,
    build_teacher,
    contract_rows,
    head_numbers,
    tensors_of_flat,
)

LOG_PROBS_WANTS = Wants(topk={"vision": 50, "response": 50})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def teacher_parts(folder: Path) -> tuple[Any, Any]:
    return load_processor(TeacherSpec(str(folder)))


@pytest.fixture(scope="module")
def spec(folder: Path) -> TeacherSpec:
    return TeacherSpec(str(folder), dtype="float32", device="cpu", backend="vllm")


@pytest.fixture(scope="module")
def log_probs_spec(spec: TeacherSpec) -> TeacherSpec:
    return replace(spec, vllm_route="logprobs")


@pytest.fixture(scope="module")
def rows(teacher_parts, mixture) -> list[Prepared]:
    """The contract's rows, captions and chats of the rendered world."""
    from teacher_cache.preparing.prepare import Preparer

    preparer = Preparer(*teacher_parts)
    found = contract_rows(*teacher_parts)
    for part in mixture:
        source = open_source(part)
        read = [row for group in source.scan(100) for row in source.read(group) if isinstance(row, Sample)]
        found += [preparer.prepare(row, part.template) for row in read[:4]]
    assert {len(one.layout) for one in found} == {0, 1, 2}
    return found


@pytest.fixture(scope="module")
def live(spec: TeacherSpec, teacher_parts, rows) -> list[TeacherOutput]:
    teacher = open_teacher(replace(spec, backend="transformers"), *teacher_parts)
    return teacher(rows, WANTS | LOG_PROBS_WANTS)


def furthest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one.numel()]
    assert pairs and all(one.shape == other.shape for one, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs)


def log_prob_difference(ours: list[TeacherOutput], theirs: list[TeacherOutput], kind: str, k: int) -> float:
    """Of the k likeliest by rank, so that near ties may change places."""
    return furthest(
        [one.topk[kind].log_probs[:, :k] for one in ours], [one.topk[kind].log_probs[:, :k] for one in theirs]
    )


def test_states_and_what_follows_equal_transformers(spec, teacher_parts, rows, live) -> None:
    said = open_teacher(spec, *teacher_parts)(rows, WANTS | LOG_PROBS_WANTS)
    for kind in ("vision", "response", "text"):
        ours, theirs = [one.hidden[kind] for one in said], [one.hidden[kind] for one in live]
        assert furthest(ours, theirs) < BOUND
        assert max(float(one.abs().max()) for one in theirs if one.numel()) > 1  # post-norm, not of length 1
    for kind in ("vision", "response"):
        assert log_prob_difference(said, live, kind, 50) < BOUND
        for column in ("log_tail", "log_z"):
            ours = [getattr(one.topk[kind], column) for one in said]
            assert furthest(ours, [getattr(one.topk[kind], column) for one in live]) < BOUND
    norm = max(float(one.gram.abs().max()) for one in live if one.gram.numel())
    assert furthest([one.gram for one in said], [one.gram for one in live]) < BOUND * norm


def test_one_row_is_itself_in_a_batch(spec, teacher_parts, rows) -> None:
    teacher = open_teacher(spec, *teacher_parts)
    together = teacher(rows[::-1], WANTS)[::-1]
    for one, batched in zip(rows[:4], together):
        (alone,) = teacher([one], WANTS)
        for kind in ("vision", "response"):
            torch.testing.assert_close(batched.hidden[kind], alone.hidden[kind], atol=1e-4, rtol=1e-4)


def test_an_expansion_that_is_not_the_rows_is_refused(spec, teacher_parts, rows) -> None:
    teacher = open_teacher(spec, *teacher_parts)
    short = replace(rows[1], input_ids=rows[1].input_ids[1:])
    with pytest.raises(CompatibilityError, match=r"vLLM reads it as \d+ tokens.*--backend transformers"):
        teacher([rows[0], short], WANTS)


def test_rows_too_long_end_in_one_line(spec, teacher_parts, rows) -> None:
    text = replace(rows[0].text, ids=rows[0].text.ids.repeat(400))
    long = replace(rows[0], text=text)
    with pytest.raises(CompatibilityError, match=r"vLLM does not support rows .*--backend transformers"):
        open_teacher(spec, *teacher_parts)([long], WANTS)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, folder: Path, mixture) -> dict[tuple[str, str], TeacherCache]:
    """(backend or route, profile) → a cache of the command line."""
    out = tmp_path_factory.mktemp("caches")
    made = {}
    for profile in ("standard", "compact", "exact"):
        for backend in ("transformers", "vllm"):
            made[backend, profile] = capture(out, folder, mixture, profile, "--backend", backend)
    made["logprobs", "compact"] = capture(
        out, folder, mixture, "compact", "--backend", "vllm", "--vllm-route", "logprobs"
    )
    return made


def command(into: Path, teacher: Path, mixture: Any, profile: str, *more: str) -> list[str]:
    caption, sft = mixture
    data = ["--data", caption.path, "--part", "caption", "--template", "plain", "--data", sft.path, "--part", "sft"]
    data += ["--template", "chat", "--image-root", caption.image_root]
    out = ["--out", str(into / "-".join([*more, profile]).replace("--", "")), "--store", profile, "--shards", "3"]
    run = ["--dtype", "float32", "--device", "cpu", "--workers", "1", *more]
    return ["cache-teacher", "--teacher", str(teacher), *data, *out, *run]


def capture(into: Path, teacher: Path, mixture: Any, profile: str, *more: str) -> TeacherCache:
    words = command(into, teacher, mixture, profile, *more)
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    return TeacherCache(words[words.index("--out") + 1])


def records(cache: TeacherCache, field: str) -> dict[str, Any]:
    rows = CachedSamples(cache, cache.parts(), [field])
    found = [rows.read(i, n) for i, count in enumerate(rows.counts) for n in range(count)]
    return {one.key: one.fields[field] for one in found}


@pytest.mark.parametrize("kind", ["vision", "response"])
def test_whole_captures_agree(caches, kind: str) -> None:
    """Hidden states exactly stored, top-k and sketches through codecs that each cache fitted for itself."""
    ours, theirs = (records(caches[backend, "exact"], f"{kind}_hidden") for backend in ("vllm", "transformers"))
    assert ours.keys() == theirs.keys() and len(ours) == 31
    apart = furthest([ours[key].float() for key in ours], [theirs[key].float() for key in ours])
    assert apart < 2**-7 * max(float(one.float().abs().max()) for one in theirs.values() if one.numel())  # bf16
    for profile in ("compact", "standard"):
        ours, theirs = (records(caches[backend, profile], f"{kind}_topk") for backend in ("vllm", "transformers"))
        assert ours.keys() == theirs.keys()
        steps = furthest([ours[key].log_probs for key in ours], [theirs[key].log_probs for key in ours])
        assert steps < 0.1  # steps of 1/64 that double at −4 nats
        same = torch.cat([(ours[key].ids == theirs[key].ids).flatten() for key in ours])
        assert same.float().mean() > 0.97  # near ties
    ours, theirs = (records(caches[backend, "standard"], f"{kind}_hidden") for backend in ("vllm", "transformers"))
    assert furthest([ours[key].mean_logit for key in ours], [theirs[key].mean_logit for key in ours]) < 0.01


def test_fields_say_who_made_them(caches, spec, teacher_parts) -> None:
    said = caches["vllm", "standard"].fields["vision_topk"]["teacher"]
    assert said["backend"] == "vllm" and "tail" not in caches["vllm", "standard"].fields["vision_topk"]["params"]
    assert said["vllm"] == {
        "version": vllm_version(),
        "route": "hidden",
        "states": "after the final norm, not normalised",
    }
    other = caches["logprobs", "compact"].fields["vision_topk"]
    assert other["params"]["tail"] == "inexact" and other["teacher"]["vllm"]["route"] == "logprobs"
    status = CliRunner().invoke(cli.main, ["cache", "status", str(caches["logprobs", "compact"].storage)])
    assert "fields/vision_topk: inexact tails" in status.output
    assert teacher_fingerprint(spec, *teacher_parts) == said


def test_log_probs_are_those_of_the_whole_head(log_probs_spec, teacher_parts, rows, live) -> None:
    """Their sum runs over the head's padding rows too, so they lie below ours by what those weigh in the row."""
    said = open_teacher(log_probs_spec, *teacher_parts)(rows, LOG_PROBS_WANTS)
    for kind in ("vision", "response"):
        for one, other in zip(said, live):
            ours, theirs = one.topk[kind], other.topk[kind]
            if not len(theirs):
                continue
            below = theirs.log_probs - ours.log_probs
            assert float((below - below[:, :1]).abs().max()) < BOUND
            assert float(below.min()) > -BOUND
            assert not ours.log_z.any()
            mass = ours.log_probs.double().exp().sum(dim=1) + ours.log_tail.double().exp()
            assert float((mass - 1).abs().max()) < 1e-5


def test_compact_by_log_probs_is_near_compact(caches) -> None:
    for kind in ("vision", "response"):
        ours, theirs = (records(caches[one, "compact"], f"{kind}_topk") for one in ("logprobs", "transformers"))
        assert ours.keys() == theirs.keys()
        same = torch.cat([(ours[key].ids == theirs[key].ids).flatten() for key in ours])
        assert same.float().mean() > 0.97


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--fields", "attention"), "vLLM gives no attention"),
        (("--fields", "vision_features"), "vLLM gives no features"),
        (("--vllm-route", "logprobs"), "gives only top-k"),
    ],
)
def test_what_it_cannot_give_is_refused_before_anything_is_written(
    tmp_path, folder, mixture, more: tuple[str, ...], words: str
) -> None:
    asked = command(tmp_path, folder, mixture, "standard", "--backend", "vllm", *more)
    asked = [one for one in asked if one not in ("--store", "standard")] if "--fields" in more else asked
    result = CliRunner().invoke(cli.main, asked)
    assert result.exit_code == 1 and words in result.output and "--backend transformers" in result.output
    assert not any(tmp_path.iterdir())


def test_two_workers(tmp_path, folder, mixture, caches) -> None:
    words = command(tmp_path, folder, mixture, "exact", "--backend", "vllm")
    words[words.index("--workers") + 1] = "2"
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    ours = records(TeacherCache(words[words.index("--out") + 1]), "response_hidden")
    theirs = records(caches["vllm", "exact"], "response_hidden")
    assert ours.keys() == theirs.keys()
    assert furthest([ours[key].float() for key in ours], [theirs[key].float() for key in ours]) < 0.05


@pytest.fixture(scope="module")
def described(spec, teacher_parts) -> dict[str, Any]:
    """What a contract is bound to: versions, and the weights of the teacher."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        | {"vllm": vllm_version()},
        "head": head_numbers(load_head(spec, *teacher_parts)),
        "bound": BOUND,
    }


def record(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write them beside what was recorded with the same versions and weights; anything else there is replaced."""
    same = VERSIONS.is_file() and json.loads(VERSIONS.read_text()) == described
    kept = container.unpack(RECORDED.read_bytes(), str(RECORDED)) if same and RECORDED.is_file() else {}
    RECORDED.write_bytes(container.pack({**kept, **tensors}))
    VERSIONS.write_text(json.dumps(described, indent=1) + "\n")


def test_states_are_recorded(spec, teacher_parts, described) -> None:
    """What vLLM hands out for the contract's rows by the route ``hidden``; the ordinary tests replay it without vLLM."""
    rows = contract_rows(*teacher_parts)
    teacher = open_teacher(spec, *teacher_parts)
    assert isinstance(teacher, VllmTeacher)
    states = [one.to(torch.float32).contiguous() for one in teacher.states(rows)]
    assert all(bool(torch.isfinite(one).all()) for one in states)
    record(described, {f"{number}.states": one for number, one in enumerate(states)})


def test_log_probs_are_recorded(log_probs_spec, teacher_parts, described) -> None:
    """The same by the route ``logprobs``, and the tokens that vLLM expands the prompts to."""
    rows = contract_rows(*teacher_parts)
    teacher = open_teacher(log_probs_spec, *teacher_parts)
    assert isinstance(teacher, VllmTeacher)
    tensors: dict[str, torch.Tensor] = {}
    for number, (row, said) in enumerate(zip(rows, teacher.log_probs(rows, 8))):
        tensors |= tensors_of_flat(said.prompt, f"{number}.prompt") | tensors_of_flat(said.last, f"{number}.last")
        tensors[f"{number}.expanded"] = row.input_ids  # equal to what vLLM read: ``log_probs`` has checked it
    assert len(tensors) == 9 * len(rows)
    record(described, tensors)
