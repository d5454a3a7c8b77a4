"""The teacher itself: batches against single rows, rows against the model's own logits, heads and weights that are refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.preparing.batch import collate, token_batches
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Prepared
from teacher_cache.sources import open_source
from teacher_cache.teachers.transformers import (
    TeacherSpec,
    TransformersTeacher,
    load_processor,
    resolve_dtype,
    teacher_fingerprint,
    weights_hash,
)
from teacher_cache.wants import Wants

WANTS = Wants({"vision", "response", "text"}, {"vision": 8, "response": 8}, gram=True)


@pytest.fixture(scope="module")
def rows(teacher_parts, mixture, world_json) -> list[Prepared]:
    """A caption, chat rows, a text-only row and a row with two pictures."""
    from teacher_cache.errors import SkipSample
    from teacher_cache.records import Sample
    from teacher_cache.sources import DataSpec

    preparer = Preparer(*teacher_parts)
    prepared = []
    pictures = DataSpec("pairs", world_json.train, image_root=str(world_json.images))
    for spec, wanted in zip((*mixture, pictures), (1, 4, 24)):
        source = open_source(spec)
        read = [row for group in source.scan(100) for row in source.read(group)][:wanted]
        for row in read:
            try:
                prepared += [preparer.prepare(row, spec.template)] if isinstance(row, Sample) else []
            except SkipSample:
                continue
    images = {len(one.layout) for one in prepared}
    assert images == {0, 1, 2}
    return prepared


@pytest.fixture(scope="module")
def teacher(teacher_model, teacher_parts) -> TransformersTeacher:
    return TransformersTeacher.wrap(teacher_model, teacher_parts[0])


def test_padding_rows_of_the_head_are_dropped(teacher, teacher_model, teacher_parts) -> None:
    length = len(teacher_parts[0].tokenizer)
    assert teacher_model.get_output_embeddings().weight.shape[0] == length + 7
    assert teacher.vocabulary == teacher.head.shape[0] == length


@torch.inference_mode()
def test_rows_against_the_models_own_logits(teacher, teacher_model, rows) -> None:
    """Each row alone, dense, in float64: nothing of batch, head or chunk is shared with what is tested."""
    for one, got in zip(rows, teacher(rows, WANTS)):
        logits = teacher_model(one.input_ids[None], **one.pixels).logits[0, :, : teacher.vocabulary].double()
        for kind, at in (("response", one.response_rows), ("vision", one.vision_positions)):
            dense = logits[at].log_softmax(dim=1)
            topk = got.topk[kind]
            assert topk.ids.shape == (len(at), 8)
            torch.testing.assert_close(topk.log_probs.double(), dense.gather(1, topk.ids), atol=2e-4, rtol=0)
            torch.testing.assert_close(topk.log_probs.double(), dense.topk(8, dim=1).values, atol=2e-4, rtol=0)
            rest = dense.scatter(1, topk.ids, -torch.inf).logsumexp(dim=1)
            torch.testing.assert_close(topk.log_tail.double(), rest, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(topk.log_z.double(), logits[at].logsumexp(dim=1), atol=2e-4, rtol=1e-5)
        vision = logits[one.vision_positions]
        torch.testing.assert_close(got.gram.double(), vision @ vision.T, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_a_batch_is_its_rows_one_by_one(teacher, rows) -> None:
    together = teacher(rows, WANTS)
    backwards = teacher(rows[::-1], WANTS)[::-1]
    for one, batched, reversed_ in zip(rows, together, backwards):
        (alone,) = teacher([one], WANTS)
        for other in (batched, reversed_):
            for kind in ("vision", "response", "text"):
                torch.testing.assert_close(other.hidden[kind], alone.hidden[kind], atol=1e-4, rtol=1e-4)
            for kind in ("vision", "response"):
                torch.testing.assert_close(other.topk[kind].log_probs, alone.topk[kind].log_probs, atol=2e-4, rtol=0)


def test_padding_is_never_read(teacher, rows) -> None:
    """Whatever stands in the padding, the rows stay the same."""
    results = []
    for pad_id in (teacher.pad_id, 100):
        batch = collate(rows[:5], pad_id)
        states = teacher.hidden(batch)
        results.append([states[batch.rows[kind]] for kind in ("vision", "response", "text")])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_only_what_is_wanted_is_computed(teacher, rows) -> None:
    (out,) = teacher(rows[:1], Wants(topk={"response": 4}))
    assert set(out.topk) == {"response"} and not out.hidden and out.gram is None


def test_collate_places(rows) -> None:
    batch = collate(rows, 0)
    length = batch.inputs["input_ids"].shape[1]
    flat = batch.inputs["input_ids"].flatten()
    assert torch.equal(flat[batch.rows["response"] + 1], batch.labels)
    assert batch.counts["vision"] == tuple(36 * len(one.layout) for one in rows)
    assert sum(batch.counts["response"]) == len(batch.labels)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [len(one) for one in rows]
    assert length == max(map(len, rows))
    assert batch.inputs["pixel_values"].shape[0] == sum(len(one.layout) for one in rows)


@pytest.mark.parametrize("budget", [1, 60, 200, 10_000])
def test_token_batches_cover_every_row_once_within_the_budget(rows, budget: int) -> None:
    batches = token_batches(rows, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rows[i]) for i in batch) <= budget


def broken(model, **changes):
    """A copy of the model whose output head computes something else than W·h."""
    copied = copy.deepcopy(model)
    original = copied.get_output_embeddings()
    head = torch.nn.Linear(original.in_features, original.out_features, bias="bias" in changes)
    head.weight = original.weight
    if "bias" in changes:
        torch.nn.init.constant_(head.bias, 0.5)
    plain, scale, cap = head.forward, changes.get("scale", 1.0), changes.get("cap", torch.inf)
    head.forward = lambda x: scale * (cap * (plain(x) / cap).tanh() if "cap" in changes else plain(x))
    copied.set_output_embeddings(head)
    return copied


@pytest.mark.parametrize("change", [{"bias": True}, {"scale": 1.01}, {"scale": 0.0625}, {"cap": 30.0}])
def test_heads_that_are_not_a_product_are_refused(teacher_model, teacher_parts, rows, change) -> None:
    with pytest.raises(CompatibilityError, match="head"):
        TransformersTeacher.wrap(broken(teacher_model, **change), teacher_parts[0])(rows[:2], WANTS)


def test_nan_weights_come_back_as_nan(teacher_model, teacher_parts, rows) -> None:
    model = copy.deepcopy(teacher_model)
    next(iter(model.model.language_model.layers[0].parameters())).data.fill_(torch.nan)
    (out,) = TransformersTeacher.wrap(model, teacher_parts[0])(rows[:1], WANTS)
    assert torch.isnan(out.hidden["response"]).all()


def test_fingerprint_binds_weights_and_settings(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    spec = TeacherSpec(str(tiny_teacher), dtype="float32")
    one = teacher_fingerprint(spec, *load_processor(spec))
    assert one == teacher_fingerprint(spec, *load_processor(spec))
    assert one["head_width"] == one["tokenizer"]["length"] + 7
    other = TeacherSpec(str(tiny_student), dtype="bfloat16", attn_implementation="eager")
    two = teacher_fingerprint(other, *load_processor(other))
    assert {name for name in one if one[name] != two[name]} == {
        "weights",
        "hidden_size",
        "dtype",
        "attn_implementation",
    }


def test_one_flipped_weight_bit_is_another_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    import shutil

    copied = Path(shutil.copytree(tiny_teacher, tmp_path / "t"))
    before = weights_hash(TeacherSpec(str(copied)), None)
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_hash(TeacherSpec(str(copied)), None) != before == weights_hash(TeacherSpec(str(tiny_teacher)), None)
    file.unlink()
    with pytest.raises(KdcliError, match="safetensors"):
        weights_hash(TeacherSpec(str(copied)), None)


def test_missing_models_and_dtypes_are_one_line(tmp_path: Path, teacher_parts) -> None:
    with pytest.raises(KdcliError, match="give a model folder or a hub id"):
        load_processor(TeacherSpec(str(tmp_path / "nothing")))
    with pytest.raises(KdcliError, match="choose auto"):
        resolve_dtype(TeacherSpec("x", dtype="int8"), teacher_parts[1])


def test_a_model_of_another_task_is_one_line(tiny_teacher: Path, tmp_path: Path) -> None:
    """Neither of images and text nor of text alone, as teacher (a null one too) and as student."""
    from transformers import CLIPConfig

    from student_train.load_student import load_student
    from teacher_cache.teachers import null

    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "clip"))
    CLIPConfig().save_pretrained(folder)
    said = r"'.*clip' \(CLIPConfig\) is neither an image-text-to-text model nor a causal language model: give a model"
    with pytest.raises(CompatibilityError, match="model " + said):
        load_processor(TeacherSpec(str(folder)))
    with pytest.raises(CompatibilityError, match="model " + said):
        null.load_processor(TeacherSpec(f"null:{folder}"))
    with pytest.raises(CompatibilityError, match="student " + said):
        load_student(str(folder), "sdpa")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_without_its_package_is_one_line(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    body = json.loads((folder / "processor_config.json").read_text())
    videos = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    body |= {"processor_class": "LlavaOnevisionProcessor", "video_processor": videos}
    (folder / "processor_config.json").write_text(json.dumps(body))
    with pytest.raises(
        KdcliError, match=r"requires the Torchvision library .*pip install 'kdcli\[families\]'"
    ) as caught:
        load_processor(TeacherSpec(str(folder)))
    assert "\n" not in str(caught.value)
