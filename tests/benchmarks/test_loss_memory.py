from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import loss_memory


def test_every_variant_has_its_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def here(variant: str, options: Any) -> dict[str, Any]:
        return loss_memory.peak_memory(
            loss_memory.parse(["--rows", "300", "--vocabulary", "3000", "--memory-of", variant])
        )

    monkeypatch.setattr(loss_memory, "of_variant", here)  # a process costs seconds of imports
    loss_memory.main(["--rows", "300", "--vocabulary", "3000"])
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(body["variants"]) == set(loss_memory.variants())
    assert all(one["seconds"] > 0 for one in body["variants"].values())


def test_a_process_of_its_own() -> None:
    options = loss_memory.parse(["--rows", "2000", "--vocabulary", "3000", "--width", "8"])
    assert loss_memory.of_variant(loss_memory.WHOLE, options)["mib"] > 2000 * 3000 * 4 / 2**20
