"""``kdcli report``: one self-contained HTML page about runs and their cache. No scripts, nothing loaded from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from pipelines.inspect import cache as inspect_cache
from pipelines.judge.preflight.request import beside
from pipelines.report.charts import run_styles, short, stage_charts, term_words
from pipelines.report.efficiency import efficiency
from pipelines.report.fidelity_files import read_fidelity
from pipelines.report.frontier import frontiers
from pipelines.report.gallery import cache_gallery
from pipelines.report.labels import label_section
from pipelines.report.lead import Lead
from pipelines.report.matching import matching_section
from pipelines.report.runs import RunRecord, read_runs
from pipelines.report.scores import collect_results, score_rows
from pipelines.report.sizes import cache_sizes
from pipelines.report.term_gradients import term_gradients
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.whole_file import refuse_unwritable, write_whole

TITLE = "Students trained from one teacher cache"


def write_report(
    runs: Sequence[Path],
    cache_url: str | None,
    out: Path,
    scores: Mapping[str, Any] | None = None,
    title: str = TITLE,
    fidelity: Sequence[Path | str] = (),
    matching: bool = True,
    lead: Lead | None = None,
) -> Path:
    """Write the page.

    Args:
        runs: output folders of ``kdcli train-student``, or folders of such. cache_url: adds sizes and decoded images.
        scores: name (``teacher``, ``llava-kd``, …) → a result of ``pipelines.judge.evaluation.run.score``, or a list of them, one a seed;
            names that are missing here come from ``scores.json`` in the run folders.
        fidelity: files of ``kdcli fidelity --out FILE.json`` or folders of ``kdcli preflight``; none: the preflight that the cache is of.
        lead: what the page is to say first.
        matching: match the vision tokens of finished students whose method does, which loads each and runs it on two rows.

    Raises:
        KdcliError: a folder without a run, a damaged file, a cache that cannot be opened, a page that cannot be written.
    """
    out = Path(out)
    refuse_unwritable(out)
    read = read_runs(runs)
    cache = TeacherCache(cache_url) if cache_url else None
    measured = read_fidelity(fidelity or (beside(cache_url) if cache_url else []))
    status = inspect_cache.status(cache) if cache else None
    page = template().render(
        title=title,
        lead=lead,
        header=header(read, cache),
        scores=score_rows(collect_results(read, scores)),
        runs=[run_row(run, cache) for run in read],
        styles=run_styles(read),
        stages=stage_charts(read),
        term_words=term_words(read),
        gradients=term_gradients(read),
        efficiency=efficiency(read, status),
        sizes=cache_sizes(cache, status) if cache and status else None,
        frontiers=frontiers(measured),
        gallery=cache_gallery(cache) if cache else None,
        labels=label_section(cache, status["columns"]["samples"]["written"]) if cache and status else None,
        matching=matching_section(read, cache) if cache and matching else None,
        settings=[(run, settings_table(run)) for run in read],
    )
    write_whole(out, page)
    return out


def template(name: str = "page.html") -> jinja2.Template:
    """A page's template; escaping is on for every file, and a name that is not passed is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    settings = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **settings)  # type: ignore[arg-type]
    environment.filters["short"] = short
    return environment.get_template(name)


def header(runs: Sequence[RunRecord], cache: TeacherCache | None) -> list[tuple[str, str]]:
    """The facts on top: (name, value)."""
    finished = max((run.written for run in runs if run.written), default=None)
    versions = {name: value for run in runs for name, value in run.card.get("versions", {}).items()}
    facts = []
    if cache:
        facts += [("Cache", str(cache.storage)), ("Cache plan", cache.plan_hash)]
    else:
        plans = dict.fromkeys(str(run.card.get("plan_hash", "unknown")) for run in runs)
        facts += [("Cache plan", ", ".join(plans))]
    if finished:
        facts.append(("Last stage written", finished.strftime("%Y-%m-%d %H:%M UTC")))
    facts.append(("Page written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    facts.append(("Versions", ", ".join(f"{name} {value}" for name, value in versions.items()) or "unknown"))
    commits = dict.fromkeys(str(run.card["git"])[:12] for run in runs if run.card.get("git"))
    if commits:
        facts.append(("Program commit", ", ".join(commits)))
    return facts


def run_row(run: RunRecord, cache: TeacherCache | None) -> dict[str, Any]:
    """One line of the table of runs."""
    return {
        "name": run.name,
        "stages": [
            f"{stage.name} {short(stage.steps)} steps{'' if stage.done else ' (not finished)'}" for stage in run.stages
        ],
        "methods": " + ".join(dict.fromkeys(stage.method for stage in run.stages if stage.method)),
        "tokens": short(float(f"{run.tokens:.3g}")),
        "time": duration(run.seconds),
        "rate": short(float(f"{run.tokens / run.seconds:.3g}")) if run.seconds else "–",
        "other_plan": bool(cache and run.card.get("plan_hash") not in (None, cache.plan_hash)),
    }


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def settings_table(run: RunRecord) -> dict[str, Any]:
    """Settings as rows, stages as columns; nested groups are flattened, ``knobs`` being the method's own."""
    stages = run.card.get("stages", [])
    rows: dict[str, list[str]] = {}
    for number, stage in enumerate(stages):
        for name, value in flat({key: value for key, value in stage.items() if key != "stage"}):
            rows.setdefault(name, ["–"] * len(stages))[number] = value
    return {"stages": [str(stage.get("stage", "?")) for stage in stages], "rows": list(rows.items())}


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """``{"knobs": {"alpha": 1}}`` → ``[("knobs.alpha", "1")]``."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{before}{name}.")
        else:
            listed = isinstance(value, list | tuple)
            found.append((f"{before}{name}", ", ".join(map(str, value)) if listed else str(value)))
    return found
