"""The matching that a page shows is the one that training makes."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.report.matching import EXAMPLES, matching_section
from pipelines.report.runs import read_runs
from teacher_cache.preparing.batch import collate
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples


@pytest.fixture(scope="module")
def section(em_kd_run, tiny_cache):
    return matching_section(read_runs([em_kd_run]), TeacherCache(str(tiny_cache)))


def test_it_is_the_cheapest_assignment_of_raw_logits(section, em_kd_run, tiny_cache):
    """Made again with plain transformers, the stored hidden states and scipy."""
    cache = TeacherCache(str(tiny_cache))
    folder = em_kd_run / "01-DFT" / "model"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    rows = CachedSamples(cache, cache.parts(), ["vision_hidden"])
    places = {rows.key(shard, i): (shard, i) for shard, count in enumerate(rows.counts) for i in range(count)}
    (run,) = section.runs
    assert len(run.pictures) == EXAMPLES and not section.notes
    for picture in run.pictures:
        row = rows.read(*places[picture.key])
        part = row.sample.part
        preparer = Preparer(processor, model.config, Limits(2048, "skip"))
        prepared = preparer.prepare(row.sample, cache.template(part), cache.image_limits()[part])
        batch = collate([prepared], 0)
        with torch.no_grad():
            states = model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.rows["vision"]]
        teacher = cache.fields["vision_hidden"]["teacher"]
        spoken = min(teacher["head_width"], teacher["tokenizer"]["length"])
        ours = states @ model.get_output_embeddings().weight[:spoken].T
        theirs = row.fields["vision_hidden"].float() @ cache.teacher_head("vision_hidden")[:spoken].float().T
        # The first image alone: a further one of the row is matched for itself.
        at, expected = linear_sum_assignment(torch.cdist(ours[:9], theirs[:36], p=1).detach().numpy())
        assert at.tolist() == list(range(9))
        told = [one.told for one in picture.student]
        for i, j in enumerate(expected.tolist()):
            where = f"student's row {i // 3 + 1}, column {i % 3 + 1}: teacher's row {j // 6 + 1}, column {j % 6 + 1}"
            assert told[i].startswith(where)


def test_only_finished_stages_over_this_cache_are_matched(em_kd_run, tiny_cache, make_run, copy_of):
    cache = TeacherCache(str(tiny_cache))
    assert matching_section(read_runs([make_run("sft")]), cache) is None
    for change in ("plan", "done", "model"):
        folder = copy_of(em_kd_run)
        if change == "plan":
            card = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**card, "plan_hash": "another"}))
        elif change == "done":
            (folder / "01-DFT" / "done.json").unlink()
        else:
            (folder / "01-DFT" / "model").rename(folder / "elsewhere")
        assert matching_section(read_runs([folder]), cache) is None


def test_a_student_that_cannot_be_loaded_is_a_note(em_kd_run, tiny_cache, copy_of):
    folder = copy_of(em_kd_run)
    (folder / "01-DFT" / "model" / "model.safetensors").write_bytes(b"no weights")
    section = matching_section(read_runs([folder]), TeacherCache(str(tiny_cache)))
    assert not section.runs and len(section.notes) == 1 and "model.safetensors" in section.notes[0]
