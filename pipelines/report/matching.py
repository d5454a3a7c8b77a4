"""Which teacher tokens the vision tokens of a finished student are matched with, on a few rows: as training does it, one forward each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.report.efficiency import parameters
from pipelines.report.matching_picture import MatchedPicture, draw_matching, tokens_of
from pipelines.report.runs import RunRecord, stage_cards
from pipelines.terminal.progress import quiet_library_bars
from pipelines.train.stage_trainer import MAPS, load_maps
from student_train.alignment import Matching
from student_train.compression import compressor_of, with_grid
from student_train.config import TrainSettings
from student_train.dataset import TrainBatch, TrainDataset, join
from student_train.load_student import load_student
from student_train.losses.matching import UNMATCHED
from student_train.methods import create_method, hook
from student_train.needs import Served
from student_train.order import Order
from student_train.student import RowForward
from student_train.teacher_view import TeacherHeads
from teacher_cache.errors import KdcliError, SkipSample, one_line
from teacher_cache.preparing.fingerprint import preparation_version
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Sample

NEEDS = ("vision_raw_logits", "vision_hidden")
"""What an assignment looks at; a run card says which fields serve it."""
EXAMPLES = 2
"""Images a run."""
LOOKED_AT = 64
"""Rows looked through for them."""
MOST_RUNS = 3
MOST_ON_A_CPU = 1_500_000_000
"""Parameters of a student that a forward on a CPU is not asked of without being told so."""


@dataclass(frozen=True)
class MatchingStudent:
    """A finished stage whose method matches vision tokens."""

    run: RunRecord
    folder: Path
    card: Mapping[str, Any]
    method: Any
    matching: Matching


@dataclass(frozen=True)
class MatchedRun:
    """The images of one run."""

    run: str
    how: str
    pictures: list[MatchedPicture]


@dataclass
class MatchingSection:
    """runs, and what could not be shown and why."""

    runs: list[MatchedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def matching_section(runs: Sequence[RunRecord], cache: TeacherCache) -> MatchingSection | None:
    """None where no run has a finished stage that matches vision tokens with this cache's."""
    section = MatchingSection()
    shown: set[str] = set()
    for run in runs:
        try:
            # Seeds of one name look alike: the first stands for them.
            if run.group in shown or not (one := _student(run, cache)):
                continue
            shown.add(run.group)
            if len(shown) > MOST_RUNS:
                section.notes.append(f"{run.name}: {MOST_RUNS} runs are shown at most")
                continue
            section.runs.append(_match(one, cache))
        except (KdcliError, SkipSample) as error:
            section.notes.append(f"{run.name}: {error}")
        except KeyError as error:
            section.notes.append(f"{run.folder / 'run.json'}: it lacks {error}")
        except (TypeError, ValueError, AttributeError) as error:  # settings and knobs of any type
            section.notes.append(f"{run.folder / 'run.json'}: it does not fit its model ({one_line(error)})")
    return section if section.runs or section.notes else None


def _student(run: RunRecord, cache: TeacherCache) -> MatchingStudent | None:
    """The last such stage of a run over this very plan."""
    if run.card.get("plan_hash") != cache.plan_hash:
        return None
    cards = stage_cards(run.card)
    for stage in reversed([one for one in run.stages if one.done and one.folder.name in cards]):
        card = cards[stage.folder.name]
        if not set(NEEDS) & set(card.get("fields", {})) or not (stage.folder / "model").is_dir():
            continue
        method = create_method(card["method"], knobs=card.get("knobs", {}))
        matching = hook(method, "alignment")()
        if matching and matching.by != "pool":  # pooling assigns nothing
            return MatchingStudent(run, stage.folder, card, method, matching)
    return None


def _match(one: MatchingStudent, cache: TeacherCache) -> MatchedRun:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = parameters(one.folder / "model") or 0
    if device.type == "cpu" and count > MOST_ON_A_CPU:
        raise KdcliError(f"{count / 1e9:.1f} B parameters are too many for a CPU: write the report on a GPU")
    quiet_library_bars()
    # Whoever looks at a stranger's runs trusts no code of theirs, whatever their run card says.
    model, processor = load_student(str(one.folder / "model"), TrainSettings().attn_implementation)
    served = Served({need: tuple(names) for need, names in one.card["fields"].items() if need in NEEDS}, ())
    student = RowForward(model.eval(), _maps(one, cache, model, served)).to(device)
    signals = TeacherHeads.open(cache, served, device)
    upright = preparation_version(cache.plan.preparation) > 1
    pictures = [
        _picture(sample, batch, _assignment(one.matching, student, signals, batch, device), upright)
        for sample, batch in _batches(one, cache, served, model.config, processor)
    ]
    if not pictures:
        raise KdcliError(f"none of the first {LOOKED_AT} rows has an image")
    hidden = one.matching.by == "hungarian-hidden"
    how = "hidden states through the learned map" if hidden else f"vocabulary {one.matching.cost}"
    return MatchedRun(one.run.name, how, pictures)


def _maps(one: MatchingStudent, cache: TeacherCache, model: Any, served: Served) -> dict[str, torch.nn.Module]:
    """The stage's learned maps, where its matching looks through one."""
    if one.matching.by != "hungarian-hidden":
        return {}
    width = next(cache.fields[name]["teacher"]["hidden_size"] for name in served.fields["vision_hidden"])
    maps = torch.nn.ModuleDict(hook(one.method, "maps")(model.config.get_text_config().hidden_size, width))
    load_maps(one.folder / MAPS, maps)
    return dict(maps.items())


def _batches(
    one: MatchingStudent, cache: TeacherCache, served: Served, config: Any, processor: Any
) -> Iterator[tuple[Sample, TrainBatch]]:
    """The first rows with an image in the order of training, as micro-batches of one; each image once."""
    settings, parts = one.card["settings"], one.card["parts"]
    rows = CachedSamples(cache, parts, served.names)
    reader = with_grid(processor, compressor_of(config), training=True)
    preparer = Preparer.like(cache.plan.preparation, reader, config, settings["max_length"])
    order, templates = Order(rows.counts, settings["seed"]), {part: cache.template(part) for part in parts}
    check = one.matching.check_layouts
    dataset = TrainDataset(rows, order, preparer, templates, cache.image_limits(), same_grid=False, check_layouts=check)
    seen: set[bytes] = set()
    for position in range(min(LOOKED_AT, order.rows)):
        sample = rows.read(*order.at(position)).sample
        if not sample.images or sample.images[0].data in seen:
            continue
        seen.add(sample.images[0].data)
        yield sample, join([dataset[position]], processor.tokenizer.pad_token_id or 0)
        if len(seen) == EXAMPLES:
            return


@torch.no_grad()
def _assignment(
    matching: Matching, student: RowForward, signals: TeacherHeads, batch: TrainBatch, device: torch.device
) -> list[int]:
    """Teacher row of every vision row of the student, ``UNMATCHED`` for newlines."""
    hidden = student(batch.batch.to(device), ["vision"])
    ours = student.rows(hidden, batch.batch, batch.student_text)
    return matching.match(signals.view(batch), ours, batch, torch.Generator().manual_seed(0)).tolist()


def _picture(sample: Sample, batch: TrainBatch, assignment: Sequence[int], upright: bool) -> MatchedPicture:
    """The first image of a row; its tokens are the first ones on both sides."""
    ours, theirs = batch.student_layouts[0][0], batch.layouts[0][0]
    teacher = tokens_of(theirs)
    pairs = [
        (token, teacher[assignment[row]]) for row, token in tokens_of(ours).items() if assignment[row] != UNMATCHED
    ]
    return draw_matching(sample.images[0], ours, theirs, pairs, batch.batch.keys[0], upright)
