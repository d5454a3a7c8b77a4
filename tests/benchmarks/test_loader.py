from __future__ import annotations

import json

import pytest

from benchmarks import loader


def test_loader_student_webdataset_and_store(
    tiny_models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    monkeypatch.setattr(loader, "PROCESSES", (0, 1))
    monkeypatch.setattr(loader, "READ", (loader.SFT, loader.STANDARD))
    monkeypatch.setattr(loader, "BATCH", 4)
    loader.main(["--models", tiny_models, "--rows", "16", "--steps", "1", "--repeats", "1"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["rows"] == 12
    assert set(body["loader / student"]) == {f"{name}, {count}" for name in loader.READ for count in (0, 1)}
    assert all(ratio > 0 for ratio in body["loader / student"].values()) and body["ours / webdataset"] > 0
    store = body["store"]
    requests = {name: store[name]["requests per 1,000 rows"] * body["rows"] / 1000 for name in store}
    columns, shards = 5, 1
    opened = requests["full local cache"]  # commits and indices alone
    assert requests["empty local cache"] - opened == pytest.approx(columns * shards, abs=0.1)
    # The first run also lists what s3fs then remembers.
    assert columns * body["rows"] - 0.1 < requests["no local cache"] - opened < columns * body["rows"] + 10
