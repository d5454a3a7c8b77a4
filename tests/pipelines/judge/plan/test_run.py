"""`kdcli plan` against real captures: bytes in all within 5 %, of every column within 10 %; no weights; mixtures by their row counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pipelines.judge.plan.column_sizes import ColumnEstimate
from pipelines.judge.plan.field_sizes import (
    EXACT,
    MEASURED,
    RowCounts,
    coded_rows,
    member_bytes,
    record_bytes,
    size_field,
    stand_in,
)
from pipelines.judge.plan.mixture_sample import Few, parse_rows, sample_mixture
from pipelines.judge.plan.notes import shard_notes
from pipelines.judge.plan.report import estimate_tables
from pipelines.judge.plan.run import PlanRequest, estimate
from pipelines.judge.plan.teacher_cost import ModelSize, Speed, model_size
from pipelines.settings import CaptureSettings
from teacher_cache.codecs import container
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import TeacherOutput
from teacher_cache.sources import DataSpec

WIDTH, VOCABULARY = 48, 300


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def plan_of(request: Any, **more: Any) -> PlanRequest:
    """The plan of a ``CaptureRequest``."""
    return PlanRequest(request.teacher, request.data, request.settings, request.field_params, **{"rows": {}, **more})


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSpec, ...]:
    """A mixture large enough that a shard is more than padding: 40 captions, 120 chat rows, 6 of them damaged, pictures repeated."""
    from pipelines.demo.write_world import write_world

    counts = {"captions": 40, "train": 120, "heldout": 1, "defects": 6}
    world = write_world(tmp_path_factory.mktemp("larger"), seed=9, train_format="llava-json", **counts)
    return (
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", world.train, image_root=str(world.images), template="chat"),
    )


@pytest.fixture(scope="module")
def capture_profile(larger: tuple[DataSpec, ...], make_request: Callable[..., Any]) -> Callable[..., Any]:
    """``capture_profile(out, store, limit=None)`` captures the mixture with a profile; returns its request."""
    from pipelines.capture.cache_teacher import capture

    def run(out: Path, store: str, limit: int | None = None) -> Any:
        data = tuple(replace(spec, limit=limit) for spec in larger)
        request = make_request(out, data=data, fields=(), store=store, shards=3, calibration_rows=60)
        capture(request)
        return request

    return run


def compare(cache: Path, request: Any, padding: int = 0, **more: Any) -> Any:
    """Asserts the promised accuracy; returns the estimate. padding: bytes a tar that may be off besides."""
    predicted = estimate(plan_of(request, **more))
    assert predicted.bytes == pytest.approx(folder_bytes(cache), rel=0.05)
    for column in predicted.columns:
        real = folder_bytes(cache / column.name)
        assert column.bytes == pytest.approx(real, rel=0.10, abs=padding * column.tars), column.name
    once = folder_bytes(cache / "teacher") + (cache / "manifest.json").stat().st_size
    assert sum(predicted.once.values()) == pytest.approx(once, rel=0.10)
    return predicted


def test_exact_profile_within_five_per_cent(tmp_path: Path, capture_profile: Callable[..., Any]) -> None:
    request = capture_profile(tmp_path / "cache", "exact")
    predicted = compare(tmp_path / "cache", request, sample=100)
    assert {column.basis for column in predicted.columns} == {EXACT}
    assert predicted.columns[0].samples == pytest.approx(154, abs=4)
    skipped = predicted.parts[1]["skipped_share"]
    assert 0 < sum(skipped.values()) < 0.1


def test_standard_profile_by_a_smaller_cache(tmp_path: Path, capture_profile: Callable[..., Any]) -> None:
    """Coded fields by another cache of the same teacher that holds other, fewer rows and has a calibration of its own."""
    request = capture_profile(tmp_path / "cache", "standard")
    capture_profile(tmp_path / "small", "standard", limit=36)
    predicted = compare(tmp_path / "cache", request, sample=100, like=str(tmp_path / "small"))
    assert {column.basis for column in predicted.columns[1:]} == {MEASURED}
    assert not any("default" in note for note in predicted.notes)
    without = estimate(plan_of(request, sample=40))
    assert all(column.basis.startswith("default") for column in without.columns[1:])
    assert any("--like" in note for note in without.notes)


def test_every_shape_counted_field_as_captured(make_request: Callable[..., Any], tmp_path: Path) -> None:
    """Tars of six rows end on multiples of 10,240 bytes; whether that is two or three of them only their bytes tell."""
    from pipelines.capture.cache_teacher import capture

    shaped = ("response_hidden", "vision_hidden", "affinity", "relation")
    request = make_request(tmp_path / "cache", codec="bf16", fields=shaped)
    capture(request)
    predicted = compare(tmp_path / "cache", request, padding=10_240 // 2)
    assert len(predicted.columns) == 5 and {column.basis for column in predicted.columns} == {EXACT}


def test_no_weights_are_needed(tiny_teacher: Path, tmp_path: Path, make_request: Callable[..., Any]) -> None:
    bare = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with_weights = estimate(plan_of(make_request(tmp_path / "no"), sample=8))
    without = estimate(plan_of(make_request(tmp_path / "no", teacher=bare), sample=8))
    assert without.columns == with_weights.columns and without.once == with_weights.once
    assert not (tmp_path / "no").exists(), "a plan writes nothing"


def test_few_rows_stand_for_a_mixture(make_request: Callable[..., Any], tmp_path: Path) -> None:
    request = make_request(tmp_path / "no", store="exact", fields=(), shards=512)
    few = estimate(plan_of(make_request(tmp_path / "no", store="exact", fields=())))
    whole = estimate(plan_of(request, rows={"caption": 558_128, "sft": 665_298}))
    assert whole.columns[0].samples == 1_223_426
    mean = {part["part"]: part["tokens"] / part["rows"] for part in few.parts}
    assert whole.tokens == pytest.approx(558_128 * mean["caption"] + 665_298 * mean["sft"], rel=1e-3)
    assert whole.hours["gpu_hours"] > 0 and "assumed" in whole.hours["basis"]
    text = estimate_tables(whole)
    assert "558,128" in text and "fields/vision_hidden" in text and "GPU-hours" in text


def test_parts_without_fields_and_speed(make_request: Callable[..., Any], tmp_path: Path) -> None:
    request = make_request(tmp_path / "no", parts_without_fields=("caption",))
    speed = Speed(tokens_per_second=10.0, gpus=2)
    found = estimate(plan_of(request, speed=speed))
    assert found.columns[0].samples == 31 and {column.samples for column in found.columns[1:]} == {21}
    assert found.tokens == found.parts[1]["tokens"]
    assert found.hours["gpu_hours"] == pytest.approx(found.tokens / 10 / 3600)
    assert found.hours["wall_hours"] == pytest.approx(found.hours["gpu_hours"] / 2)
    assert 0 < found.hours["preparation_wall_hours"] == found.hours["preparation_process_hours"] / 2
    with pytest.raises(KdcliError, match="not a part"):
        estimate(plan_of(make_request(tmp_path / "no", parts_without_fields=("x",))))


def test_more_shards_than_rows(make_request: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(KdcliError, match="at most --shards 31"):
        estimate(plan_of(make_request(tmp_path / "no", shards=32), sample=8))


def test_bytes_of_another_teacher_say_nothing(
    make_request: Callable[..., Any], tiny_cache: Path, tmp_path: Path
) -> None:
    wide = Path(__file__).parents[4] / "pipelines" / "demo" / "assets" / "teacher"
    with pytest.raises(KdcliError, match="48 wide, this one is 256"):
        estimate(plan_of(make_request(tmp_path / "no", teacher=wide), like=str(tiny_cache)))


@pytest.mark.parametrize(
    ("tar_bytes", "said"),
    [(512 * 3 * 10**9, "3.0 GB each, more than 2 GB: use --shards 3072"), (512 * 10**7, "50 MB: use --shards 32")],
)
def test_shards_of_a_wrong_size_are_mentioned(tar_bytes: int, said: str) -> None:
    column = ColumnEstimate("fields/vision_hidden", 1000, 1000, tar_bytes, tar_bytes, 512, EXACT)
    (note,) = shard_notes(CaptureSettings(), 8, [column])
    assert said in note
    assert not shard_notes(CaptureSettings(), 8, [replace(column, tar_bytes=512 * 10**8)])


def test_operations_by_hand(teacher_model: Any, teacher_parts: tuple[Any, Any], tiny_teacher: Path) -> None:
    from teacher_cache.teachers.transformers import TeacherSpec

    counted = model_size(TeacherSpec(str(tiny_teacher)), teacher_parts[1], VOCABULARY)
    language, embedding = teacher_model.model.language_model, teacher_model.get_input_embeddings().weight
    text = sum(one.numel() for one in language.parameters()) - embedding.numel()
    every = sum(one.numel() for one in teacher_model.parameters())  # the head is the embedding
    assert counted == ModelSize(text, every - text - embedding.numel(), VOCABULARY * WIDTH)
    assert counted.flops(10, 4, 3) == 2 * (10 * counted.language + 4 * counted.vision + 3 * counted.head)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [({"rows": (7, 48)}, torch.bfloat16), ({"a": (123, 9), "b": (123,)}, torch.float32), ({"x": (0, 5)}, torch.int8)],
)
def test_record_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    assert record_bytes(tensors) == len(container.pack(tensors))


@pytest.mark.parametrize("vision", [0, 36])
@pytest.mark.parametrize("name", ["vision_hidden", "relation", "affinity"])
def test_shapes_tell_what_packing_gives(name: str, vision: int) -> None:
    params = {"codec": "int8"} if name == "vision_hidden" else {}
    one, counts = create_field(name, params), RowCounts(vision, 5, 9)
    size = size_field(one, WIDTH, VOCABULARY, None)
    assert size.basis == EXACT
    hidden = {"vision": torch.ones(vision, WIDTH), "text": torch.ones(9, WIDTH)}
    output = TeacherOutput(hidden=hidden, gram=torch.ones(vision, vision))
    real = len(container.pack(one.encode(stand_in(counts), output)))
    assert size.record("sft", counts) == pytest.approx(real, abs=8)


def test_a_field_that_looks_at_values_has_a_default() -> None:
    size = size_field(create_field("response_sampled", {}), WIDTH, VOCABULARY, None)
    assert size.basis.startswith("default") and size.record("sft", RowCounts(0, 10, 0)) > 100


def test_attention_by_pairs_and_heads() -> None:
    """Bytes of a default scale with heads where each is stored, and with text × vision tokens; an empty record has its header."""
    each, mean = (
        size_field(create_field("attention", {"heads": h}), WIDTH, VOCABULARY, None, 28) for h in ("each", "mean")
    )
    counts = RowCounts(36, 5, 9)
    assert coded_rows(create_field("attention"), counts) == 324
    assert each.record("sft", counts) - each.empty == pytest.approx(
        28 * (mean.record("sft", counts) - mean.empty), rel=0.01
    )
    nothing = {0: torch.zeros(1, 9, 0)}
    real = len(container.pack(create_field("attention").encode(None, TeacherOutput(attention=nothing))))  # type: ignore[arg-type]
    assert each.record("sft", RowCounts(0, 5, 9)) == pytest.approx(real, abs=8)


def test_rows_and_blocks() -> None:
    assert [member_bytes(n) for n in (0, 1, 512, 513)] == [512, 1024, 1024, 1536]
    of_all, of_responses = (
        create_field("affinity", {"layout": "factored", "text": one}) for one in ("all", "response")
    )
    assert coded_rows(of_all, RowCounts(36, 5, 9)) == 45 and coded_rows(of_all, RowCounts(0, 5, 9)) == 0
    assert coded_rows(of_responses, RowCounts(36, 5, 9)) == 41
    assert coded_rows(create_field("response_topk"), RowCounts(36, 5, 9)) == 5


def test_samples_are_spread(mixture: tuple[DataSpec, ...], teacher_parts: tuple[Any, Any]) -> None:
    """Seven of 21 rows, from the beginning to the end, other rows for another seed."""
    preparer = Preparer(*teacher_parts)
    (one,) = sample_mixture(mixture[1:], preparer, {}, Few(7))
    ordinals = [row.ordinal for row in one.usable]
    assert one.read >= 7 and ordinals == sorted(set(ordinals)) and one.scanned == 21


@pytest.mark.parametrize(
    ("shards", "rows", "message"),
    [
        (512, {}, "--shards 512 is more than the 21 rows of the mixture: use at most --shards 21"),
        (512, {"sft": 511}, "--shards 512 is more than the 511 rows"),
        (0, {}, "1 parts need at least that many"),
    ],
)
def test_too_many_shards_are_refused_before_a_row_is_prepared(
    mixture: tuple[DataSpec, ...],
    teacher_parts: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    rows: dict[str, int],
    message: str,
) -> None:
    monkeypatch.setattr(Preparer, "prepare", lambda *asked: pytest.fail("a row is prepared"))
    with pytest.raises(KdcliError, match=message):
        sample_mixture(mixture[1:], Preparer(*teacher_parts), rows, Few(7, shards=shards))


def test_rows_option() -> None:
    assert parse_rows(["caption=558,128", "sft=665_298"], ["caption", "sft"]) == {"caption": 558_128, "sft": 665_298}
    assert parse_rows(["779289"], ["sft"]) == {"sft": 779_289}
    for texts, message in ((["5"], "several parts"), (["x=5"], "no part 'x'"), (["sft=many"], "a number of rows")):
        with pytest.raises(KdcliError, match=message):
            parse_rows(texts, ["caption", "sft"])


def test_the_command(world: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cli

    monkeypatch.chdir(tmp_path)
    flags = [
        "--teacher",
        str(tiny_teacher),
        "--data",
        world.train,
        "--shards",
        "4",
        "--store",
        "exact",
        "--sample",
        "8",
    ]
    shown = CliRunner().invoke(cli.main, ["plan", *flags], catch_exceptions=False)
    assert shown.exit_code == 0 and "| fields/vision_hidden" in shown.output
    listed = CliRunner().invoke(cli.main, ["plan", *flags, "--rows", "779289", "--json"], catch_exceptions=False)
    body = json.loads(listed.stdout)
    assert body["parts"][0]["rows"] == 779_289 and body["bytes"] > 1e9
    wrong = CliRunner().invoke(cli.main, ["plan", *flags, "--utilisation", "2"])
    assert wrong.exit_code == 1 and "--utilisation" in wrong.output
