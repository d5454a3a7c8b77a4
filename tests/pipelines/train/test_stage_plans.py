"""Stages, weights and rates as presets bring them, and as settings change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import Settings
from pipelines.train.stage_identity import identity_knobs
from pipelines.train.stage_plans import plan_stages
from student_train.config import StageSettings, TrainSettings
from student_train.methods import create_method, method_modules
from teacher_cache.reading.cache import TeacherCache

PAPERS = {
    "llava-kd": {"DPT": (1e-3, 0.0), "SFT": (2e-5, 0.0), "DFT": (2e-5, 0.0)},
    "em-kd": {"PT": (1e-3, 0.0), "DFT": (2e-5, 0.0)},
    "epic-tcd": {"PT": (1e-3, 0.0), "DFT": (2e-5, 2e-6)},
}
"""Stage → rates of the trained modules and of the vision tower."""


def rates(cache: Path, method: str, preset: str, **told: Any) -> dict[str, tuple[float, float]]:
    stages = {name: StageSettings(**one) for name, one in told.pop("stages", {}).items()}
    settings = Settings(train=TrainSettings(**told), stages=stages)
    plans = plan_stages(TeacherCache(str(cache)), method, settings, None, preset, None)
    return {one.stage.name: (one.settings.learning_rate, one.settings.vision_tower_learning_rate) for one in plans}


@pytest.mark.parametrize("method", PAPERS)
def test_the_paper_s_stages_and_rates(tiny_cache: Path, method: str) -> None:
    assert rates(tiny_cache, method, "paper") == PAPERS[method]
    assert {tower for _, tower in rates(tiny_cache, method, "default").values()} == {0.0}


def test_what_is_set_wins_over_a_preset(tiny_cache: Path) -> None:
    given = {"learning_rate": 1e-4, "stages": {"DFT": {"vision_tower_learning_rate": 0.0}}}
    assert rates(tiny_cache, "epic-tcd", "paper", **given) == {"PT": (1e-4, 0.0), "DFT": (1e-4, 0.0)}


def test_the_paper_s_weights_whatever_the_defaults_are() -> None:
    weights = {name: {t: term.weight for t, term in create_method(name, "paper").terms().items()} for name in PAPERS}
    assert weights["llava-kd"] == {"reg": 1.0, "res": 1.0, "vis": 1.0, "rel": 0.5}
    assert weights["em-kd"] == {"sup": 0.5, "rld": 0.5, "vsd": 0.25, "vlad": 25.0}
    assert weights["epic-tcd"] == pytest.approx({"reg": 0.3, "self": 0.7})
    assert all(create_method(name).terms() for name in method_modules()), "each has a default"


def test_checkpoints_of_versions_without_a_knob_are_gone_on_with() -> None:
    plain = identity_knobs("llava-kd", create_method("llava-kd"))
    assert plain == {"alpha": 1, "beta": 1, "gamma": 0.5, "temperature": 1, "drop_vision_rows": 0, "reduction": "mean"}
    warm = identity_knobs("llava-kd", create_method("llava-kd", knobs={"temperature": 2.0}))
    assert warm["temperature_squared"] is True, "another loss than before: not gone on with"
    assert "divergence" not in identity_knobs("em-kd", create_method("em-kd"))
    assert identity_knobs("em-kd", create_method("em-kd", knobs={"divergence": "jsd"}))["divergence"] == "jsd"
