"""The frontier: fields fitted in memory on rows that are not compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.judge.fidelity import run
from pipelines.judge.fidelity.frontier import Configuration, Frontier
from pipelines.judge.fidelity.plot import plot_points, write_plot
from pipelines.judge.fidelity.show import report
from pipelines.judge.fidelity.sweep import configurations
from teacher_cache.errors import KdcliError


def test_every_configuration_is_of_fields_that_exist() -> None:
    from teacher_cache.fields import create_field

    chosen = configurations()
    assert len({(one.kind, one.label) for one in chosen}) == len(chosen)
    for one in chosen:
        for name, params in one.fields.items():
            assert name.startswith(one.kind) and create_field(name, params).wants
    labels = {one.label for one in configurations(["vision"])}
    assert {"top-12", "top-128", "threshold 16", "random 50", "top-8 + sketch 0.02", "top-16 + sketch 0.1"} <= labels
    assert {"sketch 0.1", "int8 hidden", "bf16 hidden"} <= labels


@pytest.fixture
def swept(compared: Callable[..., Any], tiny_cache_standard: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A few configurations of vision rows, and one of response rows that cannot be fitted."""
    few = [one for one in configurations(["vision"]) if one.label in LABELS]
    hopeless = Configuration("response", "top-8, no rows", {"response_topk": {"k": 8}})
    monkeypatch.setattr(run, "configurations", lambda: [*few, hopeless])
    real = Frontier.fit

    def fit(self: Frontier, name: str, params: Any) -> Any:
        if name == "response_topk":
            raise KdcliError("field response_topk: too few rows")
        return real(self, name, params)

    monkeypatch.setattr(Frontier, "fit", fit)
    return compared(tiny_cache_standard, fresh=True, samples=3, sweep=True)


LABELS = ("top-12", "threshold 16", "top-8 + sketch 0.4", "top-8 + sketch 0.02", "int8 hidden", "bf16 hidden")


def test_the_frontier(swept: dict[str, Any], tmp_path: Path) -> None:
    found = {one["label"]: one for one in swept["sweep"]}
    assert set(found) == {*LABELS, "top-8, no rows"}
    coarse, fine, half = (found[name] for name in ("top-8 + sketch 0.4", "top-8 + sketch 0.02", "bf16 hidden"))
    assert coarse["bytes_per_row"] < fine["bytes_per_row"] < half["bytes_per_row"]
    assert 96 <= half["bytes_per_row"] < 100, "48 values of two bytes, and the container"
    assert coarse["kl"]["mean"] > fine["kl"]["mean"] > half["kl"]["mean"] >= -1e-6
    assert coarse["reverse"]["head_angle"] > fine["reverse"]["head_angle"] > half["reverse"]["head_angle"]
    sampled = found["threshold 16"]
    assert sampled["kl"] is None and "reverse" not in sampled and sampled["forward"]["head_angle"] > 0
    assert found["top-8, no rows"]["error"] == "field response_topk: too few rows"
    text = report(swept)
    assert "Frontier, vision rows" in text and "top-8, no rows: field response_topk: too few rows" in text
    assert {one["family"] for one in plot_points(swept)} >= {
        "head 8 + sketch",
        "top-k",
        "sampled",
        "hidden",
        "this cache",
    }
    assert write_plot(swept, tmp_path / "p.png").stat().st_size > 5000


def test_calibration_and_compared_rows_are_apart(
    compared: Callable[..., Any], tiny_cache_standard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def note(request: Any, opened: Any, rows: Any, others: Any) -> Any:
        seen.update(rows={one.key for one in rows}, others={one.key for one in others})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "ask_teacher", note)
    with pytest.raises(KeyboardInterrupt):
        compared(tiny_cache_standard, fresh=True, samples=4, sweep=True)
    assert len(seen["rows"]) == 4 and len(seen["others"]) == 27 and not seen["rows"] & seen["others"]


def test_a_sweep_needs_other_rows(compared: Callable[..., Any], tiny_cache_standard: Path) -> None:
    with pytest.raises(KdcliError, match="too few for --samples 500, since --sweep calibrates on others"):
        compared(tiny_cache_standard, samples=500, sweep=True)
