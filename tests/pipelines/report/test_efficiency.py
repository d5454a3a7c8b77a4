"""What stages cost, from what their steps logged."""

from __future__ import annotations

import json
import struct

import pytest

from pipelines.inspect.cache import status
from pipelines.report.efficiency import NOTHING, efficiency, parameters
from pipelines.report.runs import read_runs
from pipelines.terminal.tables import human_bytes
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache


def log(folder, **values) -> None:
    """Two steps of half a second."""
    lines = [{"step": step, "loss": 1.0, "tokens": 300, "seconds": 0.5, **values} for step in range(2)]
    (folder / "01-DFT" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_rates_count_the_wait_for_data(make_run):
    folder = make_run("kd")
    sizes = {"samples": 6, "images": 4, "vision_tokens": 36, "cached_vision_tokens": 144}
    log(folder, **sizes, places=400, data_seconds=0.25, peak_memory_bytes=3_000_000_000)
    (one,) = efficiency(read_runs([folder]), None).costs
    assert (one.samples_per_second, one.tokens_per_second, one.step_seconds) == ("8", "400", "0.5")
    assert (one.waiting, one.padding, one.peak_memory) == ("33.3 %", "25.0 %", "3.0 GB")
    assert (one.student_tokens, one.teacher_tokens) == ("9", "36")
    assert one.bytes_per_sample == one.parameters == NOTHING


def test_what_an_older_program_did_not_log_is_left_out(make_run):
    found = efficiency(read_runs([make_run("kd", steps=4)]), None)
    (one,) = found.costs
    assert one.samples_per_second == "16"  # 8 samples a step, as its stage says when it is done
    assert one.waiting == one.padding == NOTHING
    assert not {"waiting", "peak_memory", "student_tokens", "bytes_per_sample"} & found.shown
    assert {"samples_per_second", "tokens_per_second", "step_seconds"} <= found.shown


def test_a_trained_run_says_everything(em_kd_run, tiny_cache):
    body = status(TeacherCache(str(tiny_cache)))
    (one,) = efficiency(read_runs([em_kd_run]), body).costs
    assert (one.student_tokens, one.teacher_tokens) == ("9", "36")
    read = ("samples", "fields/response_hidden", "fields/vision_hidden", "fields/affinity")
    assert one.bytes_per_sample == human_bytes(sum(body["columns"][name]["bytes"] / body["rows"] for name in read))
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(em_kd_run / "01-DFT" / "model")
    assert parameters(em_kd_run / "01-DFT" / "model") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": {"dtype": "F32"}}'])
def test_a_damaged_model_is_named(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(KdcliError, match=r"model.safetensors: (not JSON|it must be|it.a.shape)"):
        parameters(tmp_path)
    assert parameters(tmp_path / "none") is None
