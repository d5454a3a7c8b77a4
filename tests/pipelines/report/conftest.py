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
    """The shape of ``pipelines.evaluate.score``."""
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


@pytest.fixture
def hostile_cache(tmp_path: Path, make_request: Callable[..., Any]) -> Path:
    """A cache of two rows whose words, ids and file name are markup."""
    import PIL.Image

    from pipelines.cache_teacher import capture
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
