from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rendering
from teacher_cache.preparing.bounded_templates import BoundedEnvironment


def test_with_and_without_bounds(
    tiny_teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr("sys.argv", ["rendering", "--model", str(tiny_teacher), "--rows", "3", "--repeats", "2"])
    rendering.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [one["what"] for one in results][-1] == "preparing, own" and len(results) == 4
    assert all(one["ratio"] > 0 for one in results)
    assert chat_template_utils.ImmutableSandboxedEnvironment is BoundedEnvironment  # type: ignore[attr-defined]


def test_both_ways_write_the_same(tiny_teacher: Path) -> None:
    for name, work in rendering.works(str(tiny_teacher)).items():
        if name.startswith("rendering"):
            with rendering.unbounded():
                plain = work()
            assert plain and work() == plain
