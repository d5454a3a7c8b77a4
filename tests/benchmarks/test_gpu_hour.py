"""The list itself, with parts that stand in for benchmarks: what is answered, cut off, failed, and asked again."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_hour
from benchmarks.gpu_parts import PARTS, Part

STAND_IN = """
import json, sys, time
from pathlib import Path
kind, seen = sys.argv[1], Path(sys.argv[2])
with seen.open("a") as file:
    file.write(kind + "\\n")
if kind == "broken":
    raise SystemExit("no kernel for this GPU")
if kind == "slow":
    time.sleep(60)
print("a table")
print(json.dumps({"ratio": {"of it": [1.0, 2.5, 3.0]}}) if kind != "mute" else "no object")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Part]:
    """``stand_in(kind, seconds=30)`` → a part that writes its kind into ``tmp_path / "seen"``."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(gpu_hour, "GRACE_SECONDS", 1.0)

    def make(kind: str, seconds: float = 30.0) -> Part:
        words = f"{kind} {tmp_path / 'seen'}"
        return Part(kind, "stand_in", words, words, seconds, {"ratio": ("ratio", "of it"), "none": ("no", "such")})

    return make


@pytest.fixture
def go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """``go(parts, *words)`` → the last line; what ran before is gone from ``tmp_path / "seen"``."""

    def run(parts: list[Part], *words: str) -> dict[str, Any]:
        (tmp_path / "seen").write_text("")
        folders = ["--results", str(tmp_path / "results"), "--logs", str(tmp_path / "logs")]
        gpu_hour.main(["--device", "cpu", *folders, *words], parts)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def states(body: dict[str, Any]) -> dict[str, str | None]:
    return {name: one["state"] for name, one in body["parts"].items()}


def test_every_part_is_asked_once_whatever_becomes_of_the_others(
    stand_in: Callable[..., Part], go: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    parts = [stand_in("good"), stand_in("broken"), stand_in("slow", 1.0), stand_in("mute")]
    body = go(parts)
    assert states(body) == {"good": "done", "broken": "failed", "slow": "too long", "mute": "failed"}
    assert body["parts"]["good"]["figures"] == {"ratio": 2.5} and not body["open"]
    (file,) = (tmp_path / "results").iterdir()
    kept = json.loads(file.read_text())
    assert file.name == body["file"] and kept["machine"]["date"] == kept["parts"]["good"]["date"]
    assert kept["parts"]["good"]["result"] == {"ratio": {"of it": [1.0, 2.5, 3.0]}}
    assert kept["parts"]["broken"]["last_lines"] == ["no kernel for this GPU", "exit status 1"]
    assert states(go(parts)) == states(body) and not (tmp_path / "seen").read_text(), "all have an answer"
    go(parts, "--again", "--only", "good", "mute")
    assert (tmp_path / "seen").read_text().split() == ["good", "mute"]


def test_it_stops_in_time_and_goes_on(
    stand_in: Callable[..., Part],
    go: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the end of the minutes cuts off has no answer; another commit's answers are not this one's."""
    monkeypatch.setattr(gpu_hour, "LEAST_SECONDS", 0.0)
    parts = [stand_in("good"), stand_in("slow"), stand_in("mute")]
    body = go(parts, "--minutes", "0.04")
    assert body["open"] in (["slow", "mute"], ["good", "slow", "mute"]) and states(body)["mute"] is None
    monkeypatch.setattr(gpu_hour, "LEAST_SECONDS", 30.0)
    assert go(parts, "--minutes", "0.04")["open"] and not (tmp_path / "seen").read_text(), "too little is left to begin"
    go([stand_in("good"), stand_in("mute")])
    monkeypatch.setattr(gpu_hour, "commit", lambda: "another")
    body = go([stand_in("good")])
    assert (tmp_path / "seen").read_text() == "good\n" and body["parts"]["good"]["commit"] == "another"
    monkeypatch.setattr(gpu_hour, "commit", lambda: "a third")
    monkeypatch.setattr(gpu_hour, "LEAST_SECONDS", 0.0)
    body = go([stand_in("good")], "--minutes", "0.0001")
    assert body["open"] == ["good"] and body["parts"]["good"]["commit"] == "another", "the older answer stays"


def test_what_is_wrong_is_one_line(stand_in: Callable[..., Part], go: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--only 'nothing' is no part: choose from 'good'"):
        go([stand_in("good")], "--only", "nothing")
    (file,) = (tmp_path / "results" / go([stand_in("good")])["file"],)
    file.write_text("[]")
    with pytest.raises(SystemExit, match="holds no answers: remove it"):
        go([stand_in("good")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_hour.main(["--device", "cuda"], [])


def test_the_benchmarks_take_these_words() -> None:
    for part in PARTS:
        module = importlib.import_module(part.module)
        for small in (False, True):
            words = part.command("cpu", small)[3:]
            assert callable(module.main) and "{" not in " ".join(words)
            getattr(module, "parse", list)(words)
