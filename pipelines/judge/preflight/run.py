"""``kdcli preflight``: a few hundred rows through everything that the real job will do, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipelines.capture import canaries
from pipelines.capture.calibrate import thin
from pipelines.capture.presence import at_work
from pipelines.judge.fidelity.rows import FidelitySample
from pipelines.judge.fidelity.sources import HIDDEN
from pipelines.judge.fidelity.student import compared_samples
from pipelines.judge.labels import show
from pipelines.judge.labels.survey import survey
from pipelines.judge.preflight import kd_toml
from pipelines.judge.preflight.capture import capture_sample
from pipelines.judge.preflight.chosen import KINDS, all_needs, chosen_params, ladder_wants
from pipelines.judge.preflight.conclude import Conclusion, conclude
from pipelines.judge.preflight.judge import LiveAnswers, compare_terms, judge_method
from pipelines.judge.preflight.ladder import terms_for
from pipelines.judge.preflight.live import LiveTeacher
from pipelines.judge.preflight.report import TRIED, tried_page
from pipelines.judge.preflight.request import Notebook, PreflightRequest, has_ladder, identity
from pipelines.judge.preflight.sample import Wanted, enough_rows
from pipelines.judge.preflight.student_side import StudentRead, load_side, read_as_student, row_id
from pipelines.processes.memory import give_back
from pipelines.train.stage_plans import blind_student, refuse_blind, refuse_default_parts
from student_train.methods import create_method
from teacher_cache.codecs.fitting import least_rows
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.planning.plan import Plan, content_hash
from teacher_cache.planning.plan_file import write_plan
from teacher_cache.planning.same_samples import bind_pictures
from teacher_cache.preparing.batch import row_positions
from teacher_cache.preparing.prepare import Limits as RowLimits
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import refuse_wants, teacher_fingerprint
from teacher_cache.teachers.label_ends import label_ends
from teacher_cache.teachers.transformers import load_processor, resolve_device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OpenedModels:
    """Everything that is known before any weights are loaded.

    Attributes:
        fitting: rows to choose and calibrate on. judged: ids of the held-out rows that the student reads too.
        tokens: of all rows that the teacher will be asked for. warnings: what keeps students from learning to stop.
    """

    plan: Plan
    preparer: Preparer
    fingerprint: dict[str, Any]
    notebook: Notebook
    live: LiveTeacher
    fitting: list[FidelitySample]
    read: StudentRead
    judged: frozenset[str]
    tokens: int
    warnings: list[str]

    @property
    def fitted(self) -> dict[str, int]:
        """What calibrations are fitted on: samples, and token rows by kind."""
        rows = {kind: sum(len(row_positions(row.teacher)[kind]) for row in self.fitting) for kind in KINDS}
        return {"samples": len(self.fitting), **rows}


def preflight(request: PreflightRequest, progress: Progress = lambda event, done, total: None) -> dict[str, Any]:
    """Everything; continues what is in ``request.out``. ``progress(event, done, total)`` is called as it goes on.

    Returns:
        One JSON-able object: ``go``, ``reasons``, ``rows``, ``choices``, ``methods``, ``bytes_per_sample``,
        ``estimate``, ``canaries``, ``params``, ``labels``, ``warnings``, ``kd_toml``.
    """
    opened = open_everything(request, progress)
    if opened.read.tokenizer or not opened.judged:
        why = (
            opened.read.tokenizer or f"no held-out row is usable: run `kdcli doctor`; {'; '.join(opened.read.problems)}"
        )
        return {"go": False, "reasons": [why], "warnings": opened.warnings, "out": request.out}
    with at_work(Storage(request.cache_url), "preflight"):
        return go_on(request, opened, progress)


def go_on(request: PreflightRequest, opened: OpenedModels, progress: Progress) -> dict[str, Any]:
    """Everything behind what needs no weights. The teacher leaves the memory before the student comes."""
    device = resolve_device(request.teacher)
    progress("asking the teacher", 0, 1)
    answers = ask(request, opened, device)
    receipt = write_canaries(request, opened)
    opened.live.release()
    student, rows = load_side(request.settings.train, opened.read, opened.judged, device)
    chosen = chosen_params(request, opened.notebook, student, rows, answers, progress)
    answers = replace(answers, fitting=())  # what the choice was made on: captured, it is on disk
    give_back()
    report = partial(progress, "capturing")
    seconds = capture_sample(
        request, opened.plan, opened.preparer, opened.live, opened.fingerprint, chosen.params, chosen.fitted, report
    )
    if seconds is not None:
        opened.notebook.note("tokens_per_second", opened.tokens / seconds)
    progress("comparing the cache with the live teacher", 0, 1)
    cache = TeacherCache(request.cache_url)
    terms = compare_terms(cache, opened.preparer, student, rows, answers, terms_for(all_needs(request)))
    compared = {"compared": sum(map(len, student.batches)), "judged": len(rows)}
    del student, rows, answers  # a training step needs their memory
    give_back()
    methods = []
    for done, method in enumerate(request.methods):
        progress(f"a training step of {method}", done, len(request.methods))
        methods.append(judge_method(request, cache, method, opened.read, terms, device))
    found = Conclusion(chosen, methods, receipt, {"fitted": opened.fitted, **compared})
    body = conclude(request, opened.read, opened.notebook, cache, found)
    body["warnings"] = opened.warnings
    progress("looking at labels", 0, 1)
    body["labels"], page = look_at_labels(cache)
    write_tried(request, body, page)
    return body | {"kd_toml": settle(request, body) if body["go"] else None}


def look_at_labels(cache: TeacherCache) -> tuple[dict[str, Any], str]:
    """(``labels.show.to_json`` of the sampled rows, the same as tables); ``{"error"}`` and nothing where no field tells of labels."""
    try:
        made = survey(cache)
    except KdcliError as error:
        return {"error": str(error)}, ""
    return show.to_json(made), show.page(made)


def write_tried(request: PreflightRequest, body: dict[str, Any], labels: str) -> None:
    """The tables of everything that was measured, as a page beside the cache. labels: tables of the labels."""
    page = "\n\n".join(filter(None, (tried_page(body).rstrip("\n"), labels))) + "\n"
    Storage(request.out).put_bytes(page.encode(), TRIED)


def settle(request: PreflightRequest, body: dict[str, Any]) -> dict[str, Any]:
    """The choice goes into kd.toml, or is shown."""
    chosen = {name: params for choice in body["choices"] for name, params in choice["fields"].items()}
    tables = kd_toml.tables_of(request.settings.capture.store, request.cache_url, chosen)
    return kd_toml.write(request.kd_file, tables)


def open_everything(request: PreflightRequest, progress: Progress) -> OpenedModels:
    """Reads data, processors and configurations; refuses another preflight in the same folder, or another plan."""
    progress("looking at rows", 0, 1)
    capture = request.settings.capture
    refuse_wants(request.teacher, HIDDEN)
    processor, config = load_processor(request.teacher)
    refuse_methods(request)
    preparer = Preparer(processor, config, RowLimits(capture.max_length, capture.over_length))
    for template in sorted({spec.template for spec in request.data}):
        preparer.check_template(template)
    resolve_device(request.teacher)
    unknown = set(capture.parts_without_fields) - {spec.part for spec in request.data}
    if unknown:
        raise KdcliError(f"parts_without_fields names {', '.join(sorted(unknown))}, which is not a part of the mixture")
    for name, params in request.base_fields().items():
        create_field(name, params)
    fingerprint = teacher_fingerprint(request.teacher, processor, config)
    settings = identity(request, fingerprint)
    Notebook(request.out, settings)  # another preflight is refused before its rows are read
    kinds = [kind for kind in KINDS if has_ladder(request.base_fields(), kind)]
    wanted = Wanted(least_rows(int(config.get_text_config().hidden_size)), kinds)
    plan, sides = enough_rows(request.data, request.rows, preparer, capture, wanted)
    plan = bind_pictures(Storage(request.cache_url), plan)
    notebook = Notebook(request.out, settings, plan.plan_hash)
    bare = set(capture.parts_without_fields)
    rows = [*sides[False], *sides[True]]
    if not rows:
        raise KdcliError("no sampled row is usable: run `kdcli doctor`")
    read = read_as_student(request.student, rows, plan, fingerprint, request.settings.train)
    kept = {row_id(row) for row in read.rows}
    judged = frozenset(row_id(row) for row in sides[True] if row.sample.part not in bare) & kept
    write_plan(Storage(request.cache_url), plan)
    asked = [row for row in rows if row.sample.part not in bare]
    live = LiveTeacher(request.teacher, processor, config)
    fitting = [row for row in sides[False] if row.sample.part not in bare]
    tokens = sum(len(row.teacher) for row in asked)
    templates = {spec.part: spec.template for spec in request.data}
    warnings = label_ends(request.teacher, preparer).survey((row.teacher for row in rows), templates)
    return OpenedModels(plan, preparer, fingerprint, notebook, live, fitting, read, judged, tokens, warnings)


def refuse_methods(request: PreflightRequest) -> None:
    """Methods that cannot be trained whatever is measured: vision tokens that one side has not, parts that the mixture has not."""
    student = blind_student(request.settings.train)
    parts = list(dict.fromkeys(spec.part for spec in request.data))
    for name in request.methods:
        refuse_default_parts(name, request.settings, parts, bool(student))
    blind = student if request.images else f"teacher {request.teacher.id!r}"
    for name in request.methods if blind else ():
        refuse_blind(create_method(name, knobs=request.settings.methods.get(name, {})), name, blind)


def ask(request: PreflightRequest, opened: OpenedModels, device: torch.device) -> LiveAnswers:
    """The live teacher on the judged rows, those whose whole gradients are compared one at a time too, and on the rows to fit on."""
    wants, tokens = HIDDEN | ladder_wants(request), request.settings.capture.batch_tokens
    pairs = opened.read.of(opened.judged)
    prepared = [row.teacher for row, _ in pairs]
    outputs = opened.live.listen(prepared, wants, tokens)
    alone = list(outputs)
    for number in compared_samples([one for _, one in pairs], device):
        alone[number] = opened.live.listen([prepared[number]], HIDDEN, 1)[0]
    fitting = [] if "choices" in opened.notebook.found else [row.teacher for row in opened.fitting]
    return LiveAnswers(outputs, alone, thin(opened.live.listen(fitting, wants, tokens)), opened.live.head)


def write_canaries(request: PreflightRequest, opened: OpenedModels) -> dict[str, Any]:
    """Their receipt; empty where no row of the mixture is asked."""
    rows = [row.teacher for row in opened.fitting]
    if not rows:
        return {}
    folder = f"teacher/{content_hash(opened.fingerprint)[:12]}"
    storage = Storage(request.cache_url)
    if there := canaries.receipt(storage, folder):
        return there
    model = opened.live.model
    return canaries.write(storage, folder, rows, model, model.head, opened.fingerprint["dtype"])
