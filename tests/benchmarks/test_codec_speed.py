from __future__ import annotations

import json

import pytest

from benchmarks import codec_speed


def test_both_versions_are_timed_and_weighed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow teacher: the last line has every part, both sums and their ratio."""
    monkeypatch.setattr(codec_speed, "SMALL", (8, 64))
    monkeypatch.setattr(codec_speed, "VOCABULARY", 2000)
    codec_speed.main(["--width", "64", "--side", "6", "--response", "20", "--small-width", "48", "--repeats", "1"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("rows as calibrated", "other rows"):
        one = body[name]
        assert one["decode"]["ratio"] > 0 and one["encode"]["ratio"] > 0 and len(one["parts"]) == 12
        assert set(one["bytes a row"]) == {f"{kind} {v}" for kind in ("vision", "response", "affinity") for v in (1, 2)}
    first = body["small records"][0]
    assert first["rows"] == 8 and first["stored"] == first["tables"] < first["adaptive"], "few rows stay under tables"
