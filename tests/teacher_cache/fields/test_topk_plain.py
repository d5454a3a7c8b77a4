"""Top-k of caches that hold it as plain tensors: read as before, written no more; other forms are refused by name."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import create_field, decode_record, open_field
from teacher_cache.records import TeacherOutput
from teacher_cache.signal_records import TopK
from tests.golden.make_golden import PlainTopKWriter
from tests.teacher_cache.fields.test_topk import of_logits, truth

FORMS = {"float32": 1e-5, "float16": 0.06}
"""float16 keeps 11 bits: an entry of log-prob -100 is off by 0.03."""


def described(coding: str = "plain", value_dtype: str = "float32") -> dict[str, Any]:
    return {"version": 2, "params": {"k": 8, "coding": coding, "step": 1 / 64, "value_dtype": value_dtype}}


def read(topk: TopK, value_dtype: str) -> TopK:
    """Written as it was, read by the field that the description opens."""
    body = described(value_dtype=value_dtype)
    record = PlainTopKWriter("vision_topk", body["params"]).encode(None, TeacherOutput({}, {"vision": topk}))
    return decode_record(open_field("vision_topk", body), container.pack(record), "here")


@pytest.mark.parametrize("value_dtype", FORMS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("rows", [0, 9])
def test_values_and_mass(value_dtype: str, scale: float, rows: int) -> None:
    topk = truth(1, rows, scale, 8)
    decoded = read(topk, value_dtype)
    assert torch.equal(decoded.ids, topk.ids) and decoded.ids.dtype == torch.int64
    head = decoded.log_probs.double().exp().sum(dim=1)
    torch.testing.assert_close(head + decoded.log_tail.double().exp(), torch.ones_like(head), atol=1e-6, rtol=0)
    torch.testing.assert_close(decoded.log_probs, topk.log_probs, atol=FORMS[value_dtype], rtol=1e-3)
    assert torch.equal(decoded.log_tail, topk.log_tail) and torch.equal(decoded.log_z, topk.log_z)


def test_a_tiny_head_keeps_its_mass() -> None:
    """A flat row over a large vocabulary: the head's mass is 1e-5 and 1 - e^log_tail has no digit to lose."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    decoded = read(of_logits(logits, 2), "float32")
    dense = logits.double().log_softmax(dim=1).topk(2, dim=1).values
    torch.testing.assert_close(decoded.log_probs.double(), dense, atol=1e-4, rtol=0)


def test_the_field_travels_and_writes_nothing() -> None:
    field = pickle.loads(pickle.dumps(open_field("vision_topk", described())))
    assert (field.name, field.params, field.wants.topk) == ("vision_topk", described()["params"], {"vision": 8})
    with pytest.raises(
        KdcliError, match=r"'plain' is no longer written: capture it again with `kdcli cache drop-field`"
    ):
        field.encode(None, TeacherOutput())
    with pytest.raises(CacheError, match="here"):
        decode_record(field, container.pack({"ids": torch.zeros(1)}), "here")


@pytest.mark.parametrize("coding", ["packed", "other"])
def test_another_form_is_refused_by_name(coding: str) -> None:
    said = f"field vision_topk: its coding '{coding}' is not readable: capture it again with `kdcli cache drop-field`"
    with pytest.raises(CacheError, match=said):
        open_field("vision_topk", described(coding))


@pytest.mark.parametrize("coding", ["packed", "plain"])
def test_no_capture_chooses_another_form(coding: str) -> None:
    with pytest.raises(KdcliError, match=f"coding '{coding}' is no longer written: leave it out"):
        create_field("vision_topk", {"coding": coding})
    assert create_field("vision_topk", described("coded")["params"]).params == described("coded")["params"]
