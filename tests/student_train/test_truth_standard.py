"""Losses of a standard-profile cache against the live teacher, within stated bounds.

The live teacher is the fp32 cache here, which ``test_truth`` holds to the live float64 models within 2e-5. The tiny teacher is the hard
case: random weights, 48 wide, so that no dimension of its states is idle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.signal_records import Coded
from tests.close import assert_all_close
from tests.exhaustive import of_all

EVERYTHING = {"parts": ("caption", "sft", "talk"), "per_device_train_batch_size": 35}
BOUNDS = {"res": 0.002, "vis": 0.002, "rel": 0.005}
"""Relative error of each term: four times what was measured. RDist is promised to 1 %."""


@pytest.fixture(scope="module")
def standard_cache(make_request, rich_mixture, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``standard_cache(field=params, …)``: of ``rich_mixture``, made once for the same parameters."""
    from pipelines.capture.cache_teacher import capture

    made: dict[str, Path] = {}

    def make(**params: dict[str, Any]) -> Path:
        if str(params) not in made:
            out = made[str(params)] = tmp_path_factory.mktemp("standard") / "cache"
            request = make_request(out, data=rich_mixture, fields=(), store="standard")
            capture(replace(request, field_params=params))
        return made[str(params)]

    return make


def test_every_term_is_that_of_the_live_teacher(first_step, rich_cache, standard_cache) -> None:
    live, ours = first_step(rich_cache(), **EVERYTHING), first_step(standard_cache(), **EVERYTHING)
    for name, bound in BOUNDS.items():
        assert ours.terms[name] == pytest.approx(live.terms[name], rel=bound), name
    assert ours.terms["reg"] == pytest.approx(live.terms["reg"], rel=2e-5), "labels are not the teacher's"


def test_a_coarse_step_errs_more(first_step, rich_cache, standard_cache) -> None:
    """At ten times the step both KLs err by per cents: the bounds above say something."""
    live = first_step(rich_cache(), **EVERYTHING)
    fine = first_step(standard_cache(), **EVERYTHING)
    coarse = first_step(standard_cache(vision_hidden={"step": 0.4}, response_hidden={"step": 0.4}), **EVERYTHING)
    for name in ("res", "vis"):
        errors = [abs(one.terms[name] / live.terms[name] - 1) for one in (fine, coarse)]
        assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize("temperature", of_all([2.0, 4.0], 4.0))
def test_another_temperature_is_nearly_exact(first_step, rich_cache, standard_cache, temperature: float) -> None:
    """The tail's mass is only approximate there: noted to the user, and small."""
    asked = {**EVERYTHING, "knobs": {"temperature": temperature}}
    live, ours = first_step(rich_cache(), **asked), first_step(standard_cache(), **asked)
    for name in ("res", "vis"):
        assert ours.terms[name] == pytest.approx(live.terms[name], rel=0.004), name


@pytest.mark.parametrize("method", ["kd", "minillm-offline", "jsd"])
def test_other_directions(first_step, rich_cache, standard_cache, method: str) -> None:
    """Reverse KL asks the sketch about tokens that the student likes."""
    asked = {**EVERYTHING, "method": method}
    live, ours = first_step(rich_cache(), **asked), first_step(standard_cache(), **asked)
    for name, value in live.terms.items():
        assert ours.terms[name] == pytest.approx(value, rel=0.004), name


def test_a_sketch_without_its_head_still_teaches(
    first_step, rich_cache, make_request, rich_mixture, tmp_path: Path
) -> None:
    from pipelines.capture.cache_teacher import capture

    request = make_request(tmp_path / "c", data=rich_mixture, fields=("response_hidden", "vision_hidden"))
    params = {name: {"codec": "sketch", "step": 0.04} for name in ("response_hidden", "vision_hidden")}
    capture(replace(request, field_params=params))
    live, ours = first_step(rich_cache(), **EVERYTHING), first_step(tmp_path / "c", **EVERYTHING)
    for name in BOUNDS:
        assert ours.terms[name] == pytest.approx(live.terms[name], rel=0.01), name


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("method", ["llava-kd", "em-kd"])
def test_records_that_the_training_device_restores_are_those_that_the_reader_does(
    open_stage, standard_cache, method: str, workers: int
) -> None:
    """Losses and gradients, also where symbols travel from a loader process (which multiplies with fewer threads)."""
    asked = {**EVERYTHING, "method": method, "max_grad_norm": 0.0, "dataloader_num_workers": workers}
    found = []
    for coded in (False, True):
        trainer, batches_from = open_stage(standard_cache(), coded=coded, **asked)
        step, batches = next(iter(batches_from(0)))
        assert isinstance(batches[0].fields["vision_hidden"][0], Coded) == coded
        grads: dict[str, torch.Tensor] = {}
        named = dict(trainer.model.named_parameters())
        trainer.optimizer.step = lambda grads=grads, named=named: grads.update(
            {name: one.grad.clone() for name, one in named.items() if one.grad is not None}
        )
        found.append((trainer.step(step, batches).terms, grads))
    (terms, grads), (own, ours) = found
    assert terms == pytest.approx(own, rel=1e-5) and grads.keys() == ours.keys()
    assert_all_close([ours[name] for name in grads], list(grads.values()), 1e-4)


def test_a_record_that_is_damaged_is_named_where_it_is_read(standard_cache, copy_of, monkeypatch) -> None:
    """Not where its numbers are made: in a loader process, with shard, field and key."""
    cache = TeacherCache(str(standard_cache()))
    field = type(cache.open_field("vision_hidden"))

    def broken(self, stored):
        raise CacheError("symbols are damaged")

    monkeypatch.setattr(field, "read_many", broken)
    with pytest.raises(CacheError, match=r"shard 00000\d vision_hidden \S+: symbols are damaged"):
        CachedSamples(cache, ("caption",), ["vision_hidden"], coded=True).read(0, 0)


def test_em_kd_with_all_text_wants_a_cache_of_all_text(open_stage, standard_cache) -> None:
    asked = {**EVERYTHING, "method": "em-kd", "knobs": {"text": "all"}}
    with pytest.raises(
        CompatibilityError, match=r"needs vision_text_affinity \(all text\).*of response tokens alone; --set text=all"
    ):
        open_stage(standard_cache(), **asked)
    open_stage(standard_cache(affinity={"text": "all"}), **asked)
