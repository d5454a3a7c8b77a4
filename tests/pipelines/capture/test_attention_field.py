"""The field ``attention`` through the whole house: captured, added later, looked at, verified, planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import cli
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples

FIELDS = ("response_topk", "attention")


@pytest.fixture(scope="module")
def captured(make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("attention") / "both"
    capture(make_request(out, fields=FIELDS))
    return out


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.main, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "fields" / "attention" / "data").iterdir())}


def test_rows_have_the_shape_of_their_tokens(captured: Path) -> None:
    cache = TeacherCache(str(captured))
    rows = CachedSamples(cache, cache.parts(), FIELDS)
    seen = set()
    for position, count in enumerate(rows.counts):
        for number in range(count):
            row = rows.read(position, number)
            vision = sum(image.tokens() for image in row.layout)
            attention = row.fields["attention"]
            assert attention.dtype == torch.float32 and attention.shape == (2, len(row.text.ids), vision)
            assert not vision or float(attention.sum(dim=2).max()) <= 1.03
            seen.add(vision)
    assert 0 in seen and 36 in seen


def test_added_later_it_is_the_same_bytes(captured: Path, make_request, tiny_teacher: Path, tmp_path: Path) -> None:
    from pipelines.capture.cache_teacher import capture

    out = tmp_path / "grown"
    capture(make_request(out, fields=("response_topk",)))
    flags = ["--teacher", tiny_teacher, "--dtype", "float32", "--device", "cpu", "--batch-tokens", 1024, "--workers", 1]
    run("cache", "add-field", out, "--field", "attention", *flags)
    assert bytes_of(out) == bytes_of(captured)


def test_inspect_verify_and_status(captured: Path) -> None:
    assert "attention" in run("cache", "inspect", captured)
    assert "attention" in run("cache", "status", captured)
    run("cache", "verify", captured)


def test_plan_knows_its_size(world: Any, tiny_teacher: Path, captured: Path) -> None:
    flags = [
        "--teacher",
        tiny_teacher,
        "--data",
        world.train,
        "--fields",
        ",".join(FIELDS),
        "--shards",
        4,
        "--sample",
        8,
    ]
    body = json.loads(run("plan", *flags, "--json").splitlines()[-1])
    column = next(one for one in body["columns"] if one["name"] == "fields/attention")
    assert column["bytes"] > 10_000


def test_layers_are_refused_before_the_weights_are_loaded(
    make_request: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from pipelines.capture.cache_teacher import capture
    from teacher_cache.errors import CompatibilityError, KdcliError
    from teacher_cache.models import attention
    from teacher_cache.teachers import transformers

    monkeypatch.setattr(transformers.TransformersTeacher, "__init__", lambda *arguments: pytest.fail("weights loaded"))
    request = make_request(tmp_path / "out", fields=FIELDS)
    far = replace(request, field_params={**request.field_params, "attention": {"layer": 2}})
    with pytest.raises(KdcliError, match="attention of layer 2: the model has layers 0 … 1"):
        capture(far)
    monkeypatch.setattr(attention, "KNOWN_ATTENTION", ("LlamaAttention",))
    with pytest.raises(CompatibilityError, match="Qwen2Attention"):
        capture(request)
