"""What every family promises: rows and layouts are right, a batch says what its rows say, and a cached step is the live teacher's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest
import torch

from pipelines.settings import Settings
from pipelines.train.train_student import train
from student_train.config import TrainSettings
from student_train.load_student import freeze_except, module_group
from student_train.pruning import Pruning
from teacher_cache.errors import CompatibilityError, SkipSample
from teacher_cache.families import families
from teacher_cache.preparing.batch import collate
from teacher_cache.preparing.chat import content
from teacher_cache.preparing.known_text import KnownText
from teacher_cache.preparing.layout import image_layout
from teacher_cache.preparing.prepare import Limits, Preparer
from teacher_cache.records import Image, ImageLayout, Sample, Turn, View
from teacher_cache.sources.usable_samples import decode_image
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor
from teacher_cache.wants import Wants
from tests.contracts.dense_reference import in_float64, live_view, load64, reference, teacher_batch
from tests.contracts.test_methods import loss_and_gradients
from tests.families.models import FAMILIES, Family
from tests.families.rows import CHAT, SIZES, read_rows

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
BOX = (0.5, 0.0, 1.0, 0.5)
"""The part of a picture that is painted: its upper right quarter."""


@pytest.fixture
def opened(folder_of: Callable[..., Path]) -> Callable[[Family], tuple[Any, Any, Any]]:
    """``opened(family)`` → (processor, configuration, teacher) of its tiny folder."""

    def open_(family: Family) -> tuple[Any, Any, Any]:
        spec = TeacherSpec(str(folder_of(family.name)), dtype="float32", device="cpu")
        processor, config = load_processor(spec)
        return processor, config, TransformersTeacher(spec, processor, config)

    return open_


def views_of(layout: ImageLayout) -> list[tuple[Any, ...]]:
    return [(view.crop, view.grid, view.newline, view.tail) for view in layout.views]


@each_family
def test_rows_become_tokens_and_layouts(family: Family, folder_of: Any, rows_folder: Path) -> None:
    processor, config = load_processor(TeacherSpec(str(folder_of(family.name))))
    preparer, tokenizer = Preparer(processor, config), processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(family.image_token)
    for sample, (kinds, turns) in zip(read_rows(rows_folder), CHAT, strict=True):
        row = preparer.prepare(sample)
        views = [family.views["pair" if len(kinds) > 1 else kind] for kind in kinds]
        assert [views_of(one) for one in row.layout] == views
        assert [one.size for one in row.layout] == [SIZES[kind] for kind in kinds]
        assert (row.input_ids[row.vision_positions] == image_id).all()
        assert len(row.vision_positions) == sum(one.tokens() for one in row.layout)
        assert len(row) == len(row.vision_positions) + len(row.text_positions)
        answers = "".join(f"{answer}<|end|>" for answer in turns[1::2])
        assert tokenizer.decode(row.labels.tolist()) == answers
        assert torch.equal(row.input_ids[row.response_rows + 1], row.labels)
        assert torch.equal(row.input_ids[row.text_positions], row.text.ids.to(torch.int64))
        check_text(family, processor, sample, row, views)


def check_text(family: Family, processor: Any, sample: Sample, row: Any, views: list[Any]) -> None:
    """The text is the template's, with what the processor writes around an image; that is the user's, and no label."""
    first, *rest = processor.apply_chat_template(messages_of(sample), tokenize=False).split(
        family.placeholder or family.image_token
    )
    written = first + "".join(family.text_of(one) + text for one, text in zip(views, rest, strict=True))
    assert processor.tokenizer.decode(row.text.ids.tolist()) == written
    for at in row.text.image_at:
        place = int(row.text_positions[at - 1])
        assert place + 1 in row.vision_positions, "image_at counts the text before an image's own tokens"
    around = [token for token in family.around or family.marks if token]
    marks = torch.isin(row.text.ids.to(torch.int64), torch.tensor(ids_of(processor.tokenizer, around)))
    assert int(marks.sum()) == sum(family.text_of(one).count(token) for one in views for token in around)
    assert (row.text.role[marks] == 1).all() and not row.text.response[marks].any()


def messages_of(sample: Sample) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": content(turn.text)} for turn in sample.turns]


def ids_of(tokenizer: Any, tokens: list[str]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@each_family
def test_captions_begin_with_what_the_template_writes_for_an_image(
    family: Family, folder_of: Any, rows_folder: Path
) -> None:
    processor, config = load_processor(TeacherSpec(str(folder_of(family.name))))
    preparer = Preparer(processor, config)
    for sample in read_rows(rows_folder)[:4]:
        row = preparer.prepare(sample, "plain")
        text = processor.tokenizer.decode(row.text.ids.tolist())
        around = ("<|vision_start|>", "<|vision_end|>") if "qwen" in family.name else family.marks
        caption = "".join(turn.text for turn in sample.turns if turn.role == "assistant") + "\n"
        written = "".join(map(family.text_of, map(views_of, row.layout))) if family.written else None
        assert text == (written if written is not None else "".join(around) * len(sample.images)) + caption
        assert processor.tokenizer.decode(row.labels.tolist()) == caption
        assert len(row.text.image_at) == len(sample.images)


@each_family
@torch.no_grad()
def test_a_batch_says_what_the_model_says_of_each_row(family: Family, opened: Any, rows_folder: Path) -> None:
    """Padded together, by our rows and the head, as the family's own processor and forward say of each row alone."""
    processor, config, teacher = opened(family)
    preparer = Preparer(processor, config)
    samples = read_rows(rows_folder)
    prepared = [preparer.prepare(one) for one in samples]
    states = teacher.hidden(collate(prepared, teacher.pad_id)).view(
        len(samples), -1, config.get_text_config().hidden_size
    )
    head = teacher.model.get_output_embeddings().weight
    for number, (sample, row) in enumerate(zip(samples, prepared)):
        text = processor.apply_chat_template(messages_of(sample), tokenize=False)
        images = [decode_image(one, 10**6) for one in sample.images]
        inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt", **family.arguments)
        assert torch.equal(inputs["input_ids"][0], row.input_ids)
        logits = teacher.model(**inputs).logits[0]
        torch.testing.assert_close(states[number, : len(row)] @ head.T, logits, rtol=1e-4, atol=1e-4)


@each_family
@pytest.mark.parametrize("kind", [*SIZES, "pair"])
def test_vision_tokens_stand_where_their_pixels_are(family: Family, opened: Any, kind: str) -> None:
    """A painted quarter changes the tokens of its cells by the layout and no others; attention between patches is switched off."""
    processor, config, teacher = opened(family)
    teacher.model = without_vision_attention(teacher.model, family.zeroed)
    preparer = Preparer(processor, config)
    size = SIZES["square" if kind == "pair" else kind]
    before, after = (
        preparer.prepare(picture_row([size] * (1 + (kind == "pair")), painted)) for painted in (False, True)
    )
    features = [teacher([row], Wants(features=True))[0].features for row in (before, after)]
    changed = (features[0] - features[1]).abs().amax(1) > 1e-4
    first = 0
    for number, image in enumerate(after.layout):
        is_painted = number == len(after.layout) - 1
        for view in image.views:
            check_view(view, changed[first : first + view.tokens()], size, is_painted)
            first += view.tokens()
    assert first == len(changed)


def check_view(view: View, changed: torch.Tensor, size: tuple[int, int], is_painted: bool) -> None:
    """Cells well inside of the painted box changed; those well outside, newlines and tails did not. Between them lies a cell."""
    left, top, right, bottom = (round(part * size[i % 2]) for i, part in enumerate(BOX))
    rows, columns = view.grid
    width, height = (view.crop[2] - view.crop[0]) / columns, (view.crop[3] - view.crop[1]) / rows
    patches = torch.zeros(view.tokens(), dtype=torch.bool)
    for row, column, number in view.places():
        patches[number] = True
        x, y = view.crop[0] + (column + 0.5) * width, view.crop[1] + (row + 0.5) * height
        inside = left <= x <= right and top <= y <= bottom
        outside = x < left - width or x > right + width or y < top - height or y > bottom + height
        if outside or not is_painted:
            assert not changed[number], (view, row, column)
        deep = left + width <= x <= right - width / 4 and top + height / 4 <= y <= bottom - height
        if inside and deep and is_painted:
            assert changed[number], (view, row, column)
    assert not changed[~patches].any()
    across = min(view.crop[2], right) - max(view.crop[0], left)
    down = min(view.crop[3], bottom) - max(view.crop[1], top)
    if is_painted and across >= width and down >= height:
        assert changed.any()


def picture_row(sizes: list[tuple[int, int]], painted: bool) -> Sample:
    """Grey pictures, of the last of which a box is painted."""
    import io

    images = []
    for number, size in enumerate(sizes):
        picture = PIL.Image.new("RGB", size, (90, 120, 150))
        if painted and number == len(sizes) - 1:
            box = [round(part * size[i % 2]) for i, part in enumerate(BOX)]
            PIL.ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(250, 10, 30))
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        images.append(Image(f"{number}.png", buffer.getvalue()))
    turns = (Turn("user", "<image>\n" * len(sizes) + "what?"), Turn("assistant", "grey"))
    return Sample("sft", 0, "0", "a picture", turns, tuple(images))


def without_vision_attention(model: Any, outputs: tuple[str, ...]) -> Any:
    towers = [
        one for name, one in model.named_modules() if name.endswith((".vision_tower", ".visual", ".vision_model"))
    ]
    silenced = [m for tower in towers for name, m in tower.named_modules() if name.endswith(outputs)]
    assert silenced
    for one in silenced:
        for parameter in one.parameters():
            parameter.zero_()
    return model


@each_family
def test_a_cached_step_is_the_live_teachers(
    family: Family, folder_of: Any, captured: Callable[..., Path], open_step: Callable[..., Any], tmp_path: Path
) -> None:
    """prepare → capture → train one step, vision rows one by one (llava-kd): loss and gradients of both whole models in float64."""
    teacher, student = folder_of(family.name), folder_of(family.name, width=48, extra_rows=9, seed=2)
    cache = captured(teacher)
    trainer, one = open_step(cache, student, "llava-kd")
    assert 0 in one.batch.counts["vision"] and any(one.batch.counts["vision"])
    parts = load_processor(TeacherSpec(str(teacher)))
    theirs = teacher_batch(cache, ("caption", "sft"), one.batch.keys, parts)
    view = live_view(load64(teacher), in_float64(theirs), len(parts[0].tokenizer), one.text)
    expected_loss, expected_terms, expected = reference(trainer, one, view)
    loss, terms, gradients = loss_and_gradients(trainer, [one])
    assert loss == pytest.approx(expected_loss, rel=1e-4) and terms == pytest.approx(expected_terms, rel=1e-4)
    assert gradients.keys() == expected.keys()
    error = torch.cat([(gradients[name].double() - wide).flatten() for name, wide in expected.items()]).norm()
    assert error <= 1e-3 * torch.cat([wide.flatten() for wide in expected.values()]).norm()

    settings = TrainSettings(student=str(student), output_dir=str(tmp_path / "run"), max_steps=1, report_to="none")
    result = train(str(cache), "llava-kd", Settings(train=settings), "DPT,DFT")
    processor, config = load_processor(TeacherSpec(result["model"]))
    again = TransformersTeacher(TeacherSpec(result["model"], device="cpu"), processor, config).model
    assert type(again) is type(trainer.model.model) and type(processor).__name__.endswith("Processor")


@each_family
def test_modules_are_told_apart(family: Family, folder_of: Any) -> None:
    """Every parameter belongs to the tower, the projector or the language model, and each group can be trained alone."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder_of(family.name))
    groups = {name: module_group(name) for name, _ in model.named_parameters()}
    assert set(groups.values()) == {"vision_tower", "projector", "language_model"}
    for group in set(groups.values()):
        assert {name for name, _ in freeze_except(model, [group])} == {n for n, g in groups.items() if g == group}


@each_family
def test_answers_of_a_batch_are_those_of_single_rows(family: Family, folder_of: Any, rows_folder: Path) -> None:
    """As `kdcli eval` asks: padded on the left, rows with two images and none among them."""
    from pipelines.judge.evaluation.answers import answer, prompt_of
    from student_train.load_student import load_student

    model, processor = load_student(str(folder_of(family.name)), "sdpa")
    prompts = [prompt_of(row) for row in read_rows(rows_folder)]
    together = answer(model.eval(), processor, prompts, max_new_tokens=4)
    assert together == [answer(model, processor, [prompt], max_new_tokens=4)[0] for prompt in prompts]


SHAPES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 3),
    (1, 50),
    (50, 1),
    (1, 5000),
    (5000, 1),
    (3, 2000),
    (2000, 3),
    (8, 1000),
    (1000, 8),
]
SHAPES += [(7, 200), (200, 7), (13, 500), (333, 17), (27, 1), (1, 28), (28, 28), (100, 900), (900, 100)]


@each_family
@torch.no_grad()
def test_pictures_of_any_shape_are_read_rightly_or_skipped(family: Family, opened: Any) -> None:
    """The layout has as many tokens as the model makes features, and every view of it some patch; the stored text reads back the same."""
    processor, config, teacher = opened(family)
    preparer, draw = Preparer(processor, config, Limits(max_length=1 << 20)), random.Random(1)
    known, read = KnownText(preparer, proofs=0), 0
    drawn = [(draw.randint(1, 40), draw.randint(1, 40) ** draw.randint(1, 2)) for _ in range(4)]
    for size in [*SHAPES, *drawn, *((height, width) for width, height in drawn)]:
        sample = picture_row([size], painted=False)
        try:
            row = preparer.prepare(sample)
        except SkipSample as skip:
            assert skip.reason == "processor_refused" and max(size) >= 4 * min(size), (size, skip)
            with pytest.raises(SkipSample, match="processor_refused"):
                known.prepare(sample, row.text, row.key, "chat", 10**9)
            continue
        read += 1
        assert sum(one.tokens() for one in row.layout) == len(row.vision_positions)
        assert all(view.grid[0] and view.grid[1] for image in row.layout for view in image.views)
        teacher.hidden(collate([row], 0))  # the model itself refuses features that are not as many as image tokens
        fast = known.prepare(sample, row.text, row.key, "chat", 10**9)
        assert fast.layout == row.layout and torch.equal(fast.input_ids, row.input_ids), size
    assert read >= 12


def test_one_narrow_picture_ends_no_capture_and_no_training(
    folder_of: Callable[..., Path], make_request: Any, tmp_path: Path
) -> None:
    """Of a family that has no layout for it in the capture; and behind a capture by a family that reads it."""
    from pipelines.capture.cache_teacher import capture
    from student_train.config import StageSettings
    from teacher_cache.sources import DataSpec

    pictures = [(40, 40), (1000, 8), (30, 40), (5000, 1)]
    rows = []
    for number, size in enumerate(pictures):
        PIL.Image.new("RGB", size, (90, 120, 150)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"picture {number}"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = DataSpec("sft", str(tmp_path / "rows.json"), image_root=str(tmp_path))
    how = {"data": (spec,), "shards": 1, "fields": ("response_topk",)}
    for family, skipped in (("llava-next", 2), ("llava-onevision", 0)):
        said = capture(make_request(tmp_path / family, teacher=folder_of(family), **how))
        samples = said["columns"]["samples"]
        assert samples["rows"] == 4 and samples["written"] == 4 - skipped
    student = folder_of("llava-next", width=48, extra_rows=9, seed=2)
    settings = TrainSettings(student=str(student), output_dir=str(tmp_path / "run"), max_steps=1, report_to="none")
    told: list[str] = []
    stages = {"DFT": StageSettings(parts=("sft",))}
    train(str(tmp_path / "llava-onevision"), "sft", Settings(train=settings, stages=stages), "DFT", say=told.append)
    assert any("keeps no patch" in one for one in told) and any("left out" in one for one in told)


def test_every_family_that_is_read_has_an_entry_here() -> None:
    """PaliGemma's rows are refused; SmolVLM's processor needs a package that may be absent."""
    built = {family.build(32, 5, 1)[0].model_type for family in FAMILIES.values()}
    assert {name for one in families() for name in one.model_types} - built <= {"paligemma", "smolvlm"}


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES.values() if one.name != "gemma-3"], ids=lambda one: one.name
)
def test_a_new_model_with_a_known_processor_is_cut_alike(family: Family, folder_of: Any, rows_folder: Path) -> None:
    """Without a file of its own."""
    processor, config = load_processor(TeacherSpec(str(folder_of(family.name))))
    preparer, new = Preparer(processor, config), SimpleNamespace(model_type="new", vision_config=config.vision_config)
    for sample in read_rows(rows_folder)[:4]:
        row = preparer.prepare(sample)
        sizes = [one.size for one in row.layout]
        assert image_layout(new, processor, sizes, row.pixels, len(row.vision_positions)) == row.layout


def test_idefics_tiles_are_the_processors_at_any_size(folder_of: Callable[..., Path]) -> None:
    """By numbers of tiles, which decide rows and columns but for one shape and its transpose; the texts above tell those apart."""
    processor, config = load_processor(TeacherSpec(str(folder_of("idefics3"))))
    preparer, draw = Preparer(processor, config), random.Random(0)
    for size in [(draw.randint(1, 130), draw.randint(1, 130)) for _ in range(60)]:
        row = preparer.prepare(picture_row([size], painted=False))
        assert len(row.layout[0].views) == row.pixels["pixel_values"].shape[1], size


def test_tokens_between_marks_are_not_removed(folder_of: Callable[..., Path]) -> None:
    config = load_processor(TeacherSpec(str(folder_of("idefics3"))))[1]
    with pytest.raises(CompatibilityError, match="cannot be removed inside idefics3"):
        Pruning("dart", layer=1, keep=2).check(config)
