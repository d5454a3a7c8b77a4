from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint_sums


def test_shares_of_what_is_written(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["checkpoint_sums", "--model", str(tiny_student), "--out", str(tmp_path), "--repeats", "2"]
    monkeypatch.setattr("sys.argv", words)
    checkpoint_sums.main()
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["what"] for one in body["results"]] == ["checkpoint", "model"]
    assert all(one["share_of_sums"] > 0 and one["megabytes"] > 0 for one in body["results"])
    assert not list(tmp_path.iterdir())
