"""Run folders as ``kdcli train-student`` leaves them, without the training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOSTILE = '<script>alert("turn")</script>'
"""What a row may hold; on a page it must be text."""


def result(exact_match: float, families: tuple[str, ...] = ("charts", "reading"), n: int = 10) -> dict[str, Any]:
    """The shape of ``pipelines.judge.evaluation.run.score``."""
    found = {name: {"n": n, "exact_match": exact_match} for name in families}
    return {"n": n * len(found), "exact_match": exact_match, "family_mean": exact_match, "families": found}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(name, terms=…, steps=…, plan_hash=…)`` → a run folder with one finished stage, ``01-DFT``."""

    def make(name: str, terms: tuple[str, ...] = ("reg",), steps: int = 4, plan_hash: str = "abc", **card: Any) -> Path:
        folder = tmp_path / "runs" / name
        stage = folder / "01-DFT"
        stage.mkdir(parents=True)
        lines = []
        for step in range(steps):
            values = {f"loss/{term}": math.exp(-step) + number for number, term in enumerate(terms)}
            loss = {"step": step, "loss": sum(values.values()), **values}
            lines.append(json.dumps({**loss, "tokens": 100, "seconds": 0.5}))
        (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (stage / "done.json").write_text(json.dumps({"result": {"steps": steps, "samples": 8 * steps}}))
        settings = {"learning_rate": 2e-5, "seed": 0}
        stages = [
            {"stage": "DFT", "method": "llava-kd", "knobs": {"alpha": 1.0}, "parts": ["sft"], "settings": settings}
        ]
        body = {
            "cache": "cache",
            "plan_hash": plan_hash,
            "stages": stages,
            "versions": {"torch": "2.9"},
            "git": "f" * 40,
        }
        (folder / "run.json").write_text(json.dumps({**body, **card}))
        return folder

    return make


@pytest.fixture(scope="session")
def em_kd_run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, coarse_student: Path) -> Path:
    """A finished run of ``em-kd``, one step of four rows: 9 vision tokens an image where the teacher has 36."""
    from pipelines.settings import Settings
    from pipelines.train.train_student import train
    from student_train.config import TrainSettings

    output = tmp_path_factory.mktemp("runs") / "em-kd"
    settings = TrainSettings(
        student=str(coarse_student),
        output_dir=str(output),
        compressor="none",
        per_device_train_batch_size=4,
        max_steps=1,
        report_to="none",
        log_term_gradients=1,
    )
    train(str(tiny_cache), "em-kd", Settings(train=settings), "DFT")
    return output


def way(kind: str, label: str, size: float, angle: float, **fields: dict[str, Any]) -> dict[str, Any]:
    """One entry of the sweep of ``kdcli fidelity``."""
    body = {"kind": kind, "label": label, "fields": fields, "bytes_per_row": size, "kl": {"mean": angle / 100}}
    return body | {"forward": {"loss_error": 0.001, "head_angle": angle}, "reverse": {"head_angle": 2 * angle}}


@pytest.fixture(scope="session")
def fidelity_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``kdcli fidelity --sweep --out fidelity.json`` leaves: of four ways one is beaten by another, one could not be fitted."""
    sketched = {"vision_topk": {"k": 8}, "vision_hidden": {"codec": "sketch"}}
    own = {"kind": "vision", "fields": list(sketched), "payload_per_row": 30.0, "kl": None}
    term = {"loss_error": 1e-4, "gradient_angle": 0.3}
    body = {
        "samples": 2,
        "rows": {"response": 10, "vision": 72},
        "cache": "cache",
        "teacher": "<b>teacher</b>",
        "dtype": "float32",
        "student": "student",
        "distributions": {"vision_topk + vision_hidden": own | {"forward": {"loss_error": None, "head_angle": 0.5}}},
        "sweep": [
            way("vision", "top-50", 60.0, 9.0, vision_topk={"k": 50}),
            way("vision", "sketch 0.1", 8.0, 4.0, vision_hidden={"codec": "sketch"}),
            way("vision", "bf16 hidden", 512.0, 0.0, vision_hidden={"codec": "bf16"}),
            {"kind": "vision", "label": "int4 hidden", "fields": {}, "error": "too few rows"},
        ],
        "terms": {"VSD": {"fields": list(sketched), "cache": term, "one by one": {**term, "loss_error": None}}},
    }
    file = tmp_path_factory.mktemp("fidelity") / "fidelity.json"
    file.write_text(json.dumps(body))
    return file


@pytest.fixture(scope="session")
def whole_page(
    tmp_path_factory: pytest.TempPathFactory, em_kd_run: Path, tiny_cache: Path, fidelity_file: Path
) -> Path:
    """A page with every section: results, losses, costs, cache, frontier, images and matched tokens."""
    from pipelines.report.page import write_report

    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([em_kd_run], str(tiny_cache), out, {"em-kd": result(0.5)}, fidelity=[fidelity_file])


@pytest.fixture
def hostile_cache(tmp_path: Path, make_request: Callable[..., Any]) -> Path:
    """A cache of two rows whose words, ids and file name are markup."""
    import PIL.Image

    from pipelines.capture.cache_teacher import capture
    from teacher_cache.sources import DataSpec

    source = tmp_path / "hostile"
    source.mkdir()
    PIL.Image.new("RGB", (80, 60), "teal").save(source / "a.png")
    said = [("human", f"<image>\n{HOSTILE}"), ("gpt", '</style></svg><img src=x onerror="alert(1)"> & "quoted"')]
    talk = [{"from": role, "value": text} for role, text in said]
    rows = [{"id": f"{HOSTILE}{i}", "image": "a.png", "conversations": talk} for i in range(2)]
    (source / "rows<i>.json").write_text(json.dumps(rows))
    out = tmp_path / "hostile-cache"
    spec = DataSpec("sft", str(source / "rows<i>.json"), image_root=str(source))
    capture(make_request(out, data=[spec], shards=1))
    return out
