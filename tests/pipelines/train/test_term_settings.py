"""What is said of terms in kd.toml and by flags: where it holds, and what is refused before any model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import Settings
from pipelines.train.stage_plans import plan_stages
from student_train.config import StageSettings, TrainSettings
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache


def plan(cache: Path, method: str = "llava-kd", stages: str = "DFT", **told: Any) -> Any:
    own = told.pop("own", {})
    settings = Settings(train=TrainSettings(**told), stages={name: StageSettings(**one) for name, one in own.items()})
    return plan_stages(TeacherCache(str(cache)), method, settings, stages, "default", None)


def test_settings_hold_where_the_method_s_loss_is(tiny_cache: Path) -> None:
    """Flags and [train] speak of stages with the method's loss, [stages.NAME] of its own one."""
    told = {"select": {"reg": "agreement"}, "schedule": {"vis": "linear:1:0"}}
    dpt, sft, dft = plan(tiny_cache, stages="DPT,SFT,DFT", own={"DPT": {"select": {}}}, **told)
    assert not dpt.terms.selection and dpt.terms.schedules and not sft.terms.identity()
    assert dft.terms.identity() == {"schedule": {"vis": ["linear", 1.0, 0.0]}, "select": {"reg": ["agreement"]}}
    assert not sft.served.names and dft.served.fields["response_likeliest"]
    (alone,) = plan(tiny_cache, "sft", "SFT", select={"reg": "agreement"})
    assert alone.served.names == ["response_topk"]
    (plain,) = plan(tiny_cache)
    assert not {"schedule", "select"} & plain.terms.identity().keys()


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (
            {"select": {"rel": "certainty"}},
            "select of rel: 'certainty' is not one of confidence, confidence:P, agreement",
        ),
        ({"select": {"reg": "unless-contradicted"}}, "is not one of"),
        ({"select": {"reg": "confidence:2"}}, "above 0 and at most 1"),
        ({"select": {"sup": "agreement"}}, "select: llava-kd has no term sup; its terms are reg, res, vis, rel"),
        ({"schedule": {"map": "linear:0:1"}}, "schedule: llava-kd has no term map"),
        ({"select": {"reg": "file:gone.parquet:w"}}, "gone.parquet: no such file"),
        ({"select": {"reg": 0.5}}, "select of reg must be text, got 0.5"),
        ({"own": {"DFT": {"schedule": {"sup": "linear:0:1"}}}}, r"\[stages.DFT\] schedule: no term sup there"),
        ({"stages": "PT,SFT", "select": {"reg": "agreement"}}, "no stage has its loss"),
    ],
)
def test_what_says_nothing_is_refused(tiny_cache: Path, told: dict[str, Any], says: str) -> None:
    with pytest.raises(KdcliError, match=says):
        plan(tiny_cache, **told)
