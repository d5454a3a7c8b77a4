"""``kdcli export``: what plain transformers loads is the student, whole or not at all; the card tells where it comes from."""

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
from safetensors import safe_open

import cli
from pipelines.export import check, loaded
from pipelines.export.run import ExportRequest, draft_of, export
from pipelines.judge.evaluation.run import evaluate_folder
from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.compression import compressor_of
from student_train.compressors import CompressorSpec, compressor_modules
from student_train.config import TrainSettings
from student_train.load_student import load_student, save_student
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.sources import DataSpec

NAMES = sorted(compressor_modules())
COUNTS = dict.fromkeys(NAMES, 4) | {"mqt": 7}


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers copies a folder's code before it runs it."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    for module in (dynamic_module_utils, hub):
        if hasattr(module, "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def compressed(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``compressed(name)``: ``tiny_student`` with that compressor and trained-looking weights, saved as training saves it."""
    root = tmp_path_factory.mktemp("compressed")

    def make(name: str) -> Path:
        if not (root / name).is_dir():
            torch.manual_seed(4)
            model, processor = load_student(str(tiny_student), "sdpa", compressor=CompressorSpec(name, COUNTS[name]))
            for parameter in model.model.multi_modal_projector.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            save_student(model, processor, root / name)
        return root / name

    return make


@pytest.fixture(scope="module")
def run(tiny_cache: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages with a compressor, and scores as `kdcli eval` leaves them."""
    output = tmp_path_factory.mktemp("runs") / "pooled"
    base = TrainSettings(student=str(tiny_student), output_dir=str(output), max_steps=2, report_to="none", seed=11)
    settings = Settings(train=replace(base, compressor="adaptive_pool", per_device_train_batch_size=2))
    train(str(tiny_cache), "kd", settings, "PT,DFT")
    tally = {"n": 7, "exact_match": 0.25, "tokens": 9, "nll": 1.5}
    whole = {**tally, "family_mean": 0.25, "nll_family_mean": 1.5, "families": {"count": tally}, "skipped": {}}
    (output / "scores.json").write_text(json.dumps({"pooled": whole}))
    return output


def compare_here(source: Path, folder: Path, rows: Path, **spec: Any) -> dict[str, Any]:
    """The check's comparison in this process."""
    model, processor = load_student(str(source), "sdpa", **spec)
    rows.mkdir()
    expected = check.expected_logits(model.eval(), processor, check.write_rows(rows, processor), rows)
    check.save_file(expected, rows / "expected.safetensors")
    return loaded.compare(str(folder), rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_compressor_says_the_same_from_its_package(
    compressed: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoProcessor

    result = export(ExportRequest(compressed(name), tmp_path / "package"))
    assert result["remote_code"] and result["compressor"]["name"] == name and result["dtype"] == "float32"
    found = compare_here(compressed(name), tmp_path / "package", tmp_path / "rows")
    assert found["tokens"] == [] and found["generated"] >= 1
    assert found["difference"] <= 1e-5 * found["largest"] and found["largest"] > 1
    processor = AutoProcessor.from_pretrained(tmp_path / "package", trust_remote_code=True)
    counted = processor._get_num_multimodal_tokens([(40, 30), (500, 500)])
    assert counted["num_image_tokens"] == [COUNTS[name]] * 2 and counted["num_image_patches"] == [1, 1]
    with pytest.raises(KdcliError, match="brings program code of its own, which is not run"):
        load_student(str(tmp_path / "package"), "sdpa")


def test_mqt_is_exported_with_another_count(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    export(ExportRequest(compressed("mqt"), tmp_path / "package", vision_tokens=5))
    found = compare_here(compressed("mqt"), tmp_path / "package", tmp_path / "rows", compressor=CompressorSpec("", 5))
    assert found["tokens"] == [] and found["difference"] <= 1e-5 * found["largest"]


def names_and_dtypes(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def test_a_stock_student_has_published_names_and_the_asked_dtype(tiny_student: Path, tmp_path: Path) -> None:
    """vLLM reads ``vision_model.``; transformers reads both, or the comparison would be of fresh weights."""
    result = export(ExportRequest(tiny_student, tmp_path / "stock"))
    assert not result["remote_code"] and not list((tmp_path / "stock").glob("*.py"))
    found = compare_here(tiny_student, tmp_path / "stock", tmp_path / "rows")
    assert found["tokens"] == [] and found["difference"] == 0.0
    names = names_and_dtypes(tmp_path / "stock")
    tower = [name for name in names if "vision_tower" in name]
    assert len(tower) > 10 and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert set(names.values()) == {"F32"}
    export(ExportRequest(tiny_student, tmp_path / "half", dtype="bfloat16"))
    assert set(names_and_dtypes(tmp_path / "half").values()) == {"BF16"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {one.name for one in (tmp_path / "half").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_shards_keep_their_index(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.export.weights.MAX_SHARD_BYTES", "200KB")
    export(ExportRequest(tiny_student, tmp_path / "shards"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, "pt") as opened:
            assert sorted(opened.keys()) == sorted(name for name, where in index.items() if where == file.name)
    found = compare_here(tiny_student, tmp_path / "shards", tmp_path / "rows")
    assert found["difference"] == 0.0


def test_two_exports_into_one_folder(tmp_path: Path) -> None:
    """Both found it free; the first one's stays, and nothing is left of the second."""
    out = tmp_path / "out"
    with draft_of(out) as first:
        (first / "config.json").write_text("first")
        with pytest.raises(KdcliError, match=r"out was created meanwhile"), draft_of(out) as second:
            (second / "config.json").write_text("second")
            shutil.copytree(first, out)
        shutil.rmtree(out)
    assert (out / "config.json").read_text() == "first" and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_run_is_exported_checked_and_described(run: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """The whole command: a fresh process, the card with what the run knows."""
    out = tmp_path / "exported"
    arguments = ["export", str(run), "--out", str(out), "--dtype", "bfloat16", "--check", "--json"]
    done = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["model"] == str(run / "02-DFT" / "model")
    seen = result["check"]
    assert seen["rows"] == 3 and seen["difference"] <= seen["bound"] <= 1e-5 * max(1, seen["largest"])
    assert seen["generated"] >= 1 and seen["project"] == [] and seen["rounding"] > 100 * seen["bound"]
    assert [one.name for one in tmp_path.iterdir() if "draft" in one.name] == []
    card = (out / "README.md").read_text()
    identity = json.loads((run / "run.json").read_text())
    teacher = json.loads((tiny_cache / "fields" / "response_topk" / "field.json").read_text())["teacher"]
    told = (
        identity["plan_hash"],
        identity["git"] or "unknown",
        teacher["weights"],
        teacher["architecture"],
        "`adaptive_pool`",
    )
    told += (
        "Stage DFT**: method `kd`",
        "2 steps, 4 samples",
        "seed 11",
        "trust_remote_code=True",
        "License: not stated",
    )
    told += ("transformers 5.", "caption 10", "exact match", "`student`")
    assert [one for one in told if one not in card] == []
    assert str(run.parent) not in card and str(tiny_cache.parent) not in card, (
        "places of this machine are nobody's business"
    )


def test_eval_of_the_package_is_eval_of_the_student(run: Path, world: Any, tmp_path: Path) -> None:
    export(ExportRequest(run / "02-DFT", tmp_path / "package"))
    spec = DataSpec("heldout", str(world.heldout), image_root=str(world.images))
    own, exported = (
        evaluate_folder(str(folder), spec, device="cpu", trust_remote_code=trusted)
        for folder, trusted in ((run / "02-DFT" / "model", False), (tmp_path / "package", True))
    )
    assert exported["nll"] == pytest.approx(own["nll"], rel=1e-5) and exported["n"] == own["n"] == 7
    assert [one.given for one in exported["answers"]] == [one.given for one in own["answers"]]


@pytest.mark.parametrize("damage", ["logits", "tokens"])
def test_a_folder_that_differs_is_not_written(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The comparison runs in this process, on a draft that something spoiled."""

    def spoiled(folder: Path, rows: Path) -> dict[str, Any]:
        if damage == "tokens":
            text = (folder / "processor_config.json").read_text()
            (folder / "processor_config.json").write_text(
                text.replace('"num_additional_image_tokens": 0', '"num_additional_image_tokens": 2')
            )
        else:
            tensors = check_weights(folder)
            tensors["language_model.model.norm.weight"] *= 1.001
            check.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return loaded.compare(str(folder), rows)

    monkeypatch.setattr(check, "run_fresh", spoiled)
    words = {"logits": "logits differ by up to", "tokens": r"writes \d+ tokens, or other tokens, for a row of \d+"}[
        damage
    ]
    with pytest.raises(KdcliError, match=words):
        export(ExportRequest(tiny_student, tmp_path / "out", check=True))
    assert not [one for one in tmp_path.iterdir() if one.name.startswith("out")]


def check_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_what_cannot_be_exported(
    run: Path, compressed: Callable[[str], Path], tiny_student: Path, tmp_path: Path
) -> None:
    def refuses(words: str, source: Path, kind: type[KdcliError] = KdcliError, out: str = "out", **more: Any) -> None:
        with pytest.raises(kind, match=words) as caught:
            export(ExportRequest(source, tmp_path / out, **more))
        assert "\n" not in str(caught.value)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    refuses("taken already exists", tiny_student, out="taken")
    refuses("is neither a model folder", tmp_path)
    refuses("already has compressor adaptive_pool", run, CompatibilityError, vision_tokens=4)
    refuses("has no compressor, which vision_tokens 4 needs", tiny_student, vision_tokens=4)
    refuses("40 vision tokens of a 6×6 grid", compressed("mqt"), CompatibilityError, vision_tokens=40)

    odd = tmp_path / "odd"  # as a 27×27 grid cannot become 144
    shutil.copytree(compressed("adaptive_pool"), odd)
    config = json.loads((odd / "config.json").read_text())
    config["kdcli_compressor"]["vision_tokens"] = 16
    (odd / "config.json").write_text(json.dumps(config))
    refuses("16 vision tokens cannot be made of a 6×6 grid.*choose.*9, 4, 1", odd, CompatibilityError)

    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "own.Model"}}))
    refuses("has program code of its own", strange)

    half = tmp_path / "half"
    (half / "01-PT").mkdir(parents=True)
    shutil.copy(run / "run.json", half / "run.json")
    refuses("its last stage is not finished.*no stage has a model yet", half)
    shutil.copytree(run / "01-PT" / "model", half / "01-PT" / "model")
    refuses("or take .*01-PT/model", half)

    (tmp_path / "scores.json").write_text('{"a": 1}')
    refuses(
        "scores.json: the result 'a' must be an object: write it again with `kdcli eval --out`",
        tiny_student,
        scores=tmp_path / "scores.json",
    )
    assert {one.name for one in tmp_path.iterdir()} <= {"taken", "odd", "strange", "half", "scores.json", "modules"}
    assert [one.name for one in taken.iterdir()] == ["mine.txt"]


def test_a_model_that_stands_alone(tiny_student: Path, tmp_path: Path) -> None:
    """Nothing is made up about its training; an empty folder is taken."""
    (tmp_path / "out").mkdir()
    export(ExportRequest(tiny_student, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its training is unknown" in card and "trust_remote_code" not in card
    assert compressor_of(load_student(str(tmp_path / "out"), "sdpa")[0].config) is None
