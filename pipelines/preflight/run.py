"""``kdcli preflight``: a few hundred rows through everything that the real job will do, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.calibrate import thin
from pipelines.fidelity.rows import Row
from pipelines.fidelity.sources import HIDDEN
from pipelines.fidelity.student import Student
from pipelines.preflight import canaries, kd_toml
from pipelines.preflight.capture import capture_sample
from pipelines.preflight.choose import Limits, choose
from pipelines.preflight.conclude import Found, conclude
from pipelines.preflight.judge import LiveAnswers, compare_terms, judge_method, needs_of
from pipelines.preflight.ladder import Bench, candidates, terms_for
from pipelines.preflight.live import LiveTeacher
from pipelines.preflight.request import Notebook, PreflightRequest, has_ladder, identity
from pipelines.preflight.sample import held_out, read_rows, sample_plan
from pipelines.preflight.student_side import StudentRead, load_side, read_as_student, row_id
from pipelines.presence import at_work
from pipelines.stage_plans import refuse_blind
from student_train.cache import Cache
from student_train.methods import create_method
from student_train.needs import Need
from student_train.student import open_student
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field
from teacher_cache.label_ends import label_ends
from teacher_cache.model_kind import reads_images
from teacher_cache.plan import Plan, content_hash, parts_with_images, write_plan
from teacher_cache.prepare import Limits as RowLimits
from teacher_cache.prepare import Preparer
from teacher_cache.same_rows import bind_pictures
from teacher_cache.shards.storage import Storage
from teacher_cache.teachers.backends import refuse_wants, teacher_fingerprint
from teacher_cache.teachers.transformers import load_processor, resolve_device

KINDS = ("response", "vision")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Opened:
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
    fitting: list[Row]
    read: StudentRead
    judged: frozenset[str]
    tokens: int
    warnings: list[str]


def preflight(request: PreflightRequest, progress: Progress = lambda event, done, total: None) -> dict[str, Any]:
    """Everything; continues what is in ``request.out``. ``progress(event, done, total)`` is called as it goes on.

    Returns:
        One JSON-able object: ``go``, ``reasons``, ``rows``, ``choices``, ``methods``, ``bytes_per_sample``,
        ``estimate``, ``canaries``, ``params``, ``warnings``, ``kd_toml``.
    """
    opened = open_everything(request, progress)
    if opened.read.tokenizer or not opened.judged:
        why = (
            opened.read.tokenizer or f"no held-out row is usable: run `kdcli doctor`; {'; '.join(opened.read.problems)}"
        )
        return {"go": False, "reasons": [why], "warnings": opened.warnings, "out": request.out}
    with at_work(Storage(request.cache_url), "preflight"):
        return go_on(request, opened, progress)


def go_on(request: PreflightRequest, opened: Opened, progress: Progress) -> dict[str, Any]:
    """Everything behind what needs no weights."""
    device = resolve_device(request.teacher)
    student, rows = load_side(request.settings.train, opened.read, opened.judged, device)
    answers = ask(request, opened, rows, progress)
    choices, params = chosen_params(request, opened, student, rows, answers, progress)
    receipt = write_canaries(request, opened)
    report = partial(progress, "capturing")
    seconds = capture_sample(request, opened.plan, opened.preparer, opened.live, opened.fingerprint, params, report)
    if seconds is not None:
        opened.notebook.note("tokens_per_second", opened.tokens / seconds)
    progress("comparing the cache with the live teacher", 0, 1)
    cache = Cache(request.cache_url)
    terms = compare_terms(cache, opened.preparer, student, rows, answers, terms_for(all_needs(request)))
    del student
    methods = []
    for done, method in enumerate(request.methods):
        progress(f"a training step of {method}", done, len(request.methods))
        methods.append(judge_method(request, cache, method, opened.read, terms, device))
    found = Found(choices, params, methods, receipt)
    body = conclude(request, opened.read, len(rows), opened.notebook, cache, found)
    body["warnings"] = opened.warnings
    return body | {"kd_toml": settle(request, body) if body["go"] else None}


def settle(request: PreflightRequest, body: dict[str, Any]) -> dict[str, Any]:
    """The choice goes into kd.toml, or is shown."""
    chosen = {name: params for choice in body["choices"] for name, params in choice["fields"].items()}
    tables = kd_toml.tables_of(request.settings.capture.store, request.cache_url, chosen)
    return kd_toml.write(request.kd_file, tables)


def open_everything(request: PreflightRequest, progress: Progress) -> Opened:
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
        raise KdcliError(f"parts_without_fields names {', '.join(sorted(unknown))}, which is no part of the mixture")
    for name, params in request.base_fields().items():
        create_field(name, params)
    fingerprint = teacher_fingerprint(request.teacher, processor, config)
    plan = sample_plan(request.data, request.rows, preparer.fingerprint(), capture.seed)
    for part in parts_with_images(plan.slices):
        preparer.check_images(part, plan.spec(part).template)
    plan = bind_pictures(Storage(request.cache_url), plan)
    notebook = Notebook(request.out, identity(request, plan.plan_hash, fingerprint))
    bare = set(capture.parts_without_fields)
    held = held_out(plan)
    sides = {
        side: read_rows(plan, preparer, [one for n, one in enumerate(plan.slices) if (n in held) is side])
        for side in (False, True)
    }
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
    return Opened(plan, preparer, fingerprint, notebook, live, fitting, read, judged, tokens, warnings)


def refuse_methods(request: PreflightRequest) -> None:
    """CompatibilityError for a method that learns from vision tokens where teacher or student has none."""
    blind = "" if request.images else f"teacher {request.teacher.id!r}"
    if not blind:
        config = open_student(request.student, request.settings.train.trust_remote_code)[1]
        blind = "" if reads_images(config) else f"student {request.student!r}"
    for name in request.methods if blind else ():
        refuse_blind(create_method(name, "paper", request.settings.methods.get(name, {})), name, blind)


def all_needs(request: PreflightRequest) -> frozenset[Need]:
    return frozenset().union(*(needs_of(request, method) for method in request.methods))


def ask(request: PreflightRequest, opened: Opened, student: list[Row], progress: Progress) -> LiveAnswers:
    """The live teacher on the judged rows, in batches and one at a time."""
    progress("asking the teacher", 0, 1)
    rows = [row.teacher for row in student]
    wants = HIDDEN | ladder_wants(request)
    outputs = opened.live.listen(rows, wants, request.settings.capture.batch_tokens)
    alone = opened.live.listen(rows, HIDDEN, 1)
    return LiveAnswers(outputs, alone, opened.live.head)


def ladder_wants(request: PreflightRequest) -> frozenset[str]:
    """What the teacher must compute for every candidate."""
    base = request.base_fields()
    ladder = [one for kind in KINDS if has_ladder(base, kind) for one in candidates(kind, base)]
    fields = [create_field(name, params) for one in ladder for name, params in one.fields.items()]
    return frozenset().union(*(one.wants for one in fields))


def chosen_params(
    request: PreflightRequest,
    opened: Opened,
    student: Student,
    rows: list[Row],
    answers: LiveAnswers,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(what was chosen for each row kind and why, field → parameters over the profile's); noted, so that a re-run captures the same."""
    found = opened.notebook.found.get("choices")
    base = request.base_fields()
    kinds = [kind for kind in KINDS if has_ladder(base, kind)]
    if found is None:
        found = []
        if kinds:
            wants = ladder_wants(request) | frozenset(f"hidden.{kind}" for kind in KINDS)
            fitting = [row.teacher for row in opened.fitting]
            calibration = thin(opened.live.listen(fitting, wants, request.settings.capture.batch_tokens))
            teacher_rows = [row.teacher for row in rows]
            needed = terms_for(all_needs(request))
            bench = Bench(student, teacher_rows, answers.outputs, calibration, answers.head, needed)
            left = float(request.max_bytes) if request.max_bytes else None
            for kind in kinds:
                limits = Limits(request.max_kl, request.max_angle, left)
                report = partial(progress, f"choosing parameters of {kind} rows")
                choice = choose(kind, candidates(kind, base), bench, limits, report)
                left = max(1.0, left - choice.chosen.bytes_per_sample) if left else None
                found.append(choice.to_json())
        opened.notebook.note("choices", found)
    params = request.kept_params()
    for choice in found:
        params |= choice["fields"]
    return found, params


def write_canaries(request: PreflightRequest, opened: Opened) -> dict[str, Any]:
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
