"""What a student is worth, and the folder it is shipped as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import load, split, teacher_spec, train_settings
from pipelines.command_line.options import (
    A_FILE,
    A_FOLDER,
    A_PATH,
    config_option,
    device_option,
    json_option,
    links_option,
    trust_option,
)
from pipelines.command_line.output import console, note, say
from pipelines.command_line.tour import command

MOST_ASKED = 0.9
"""Share of a held-out file below which its scores are of another file than the one that was named."""


@command("eval")
@click.argument("model")
@click.option("--data", required=True, help="File of held-out questions.")
@click.option("--image-root", default=None)
@click.option(
    "--template",
    help="Template used in training: chat, v1, qwen_1_5; default: its run's, else chat.",
)
@links_option
@click.option("--limit", type=int, default=None)
@click.option("--batch-size", default=32, show_default=True)
@click.option(
    "--metric",
    default="exact_match",
    show_default=True,
    help="Metrics, comma-separated (docs/evaluate.md).",
)
@click.option(
    "--max-new-tokens",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of tokens of an answer.",
)
@click.option("--prompt-suffix", default="", help="Line added after every question, e.g. to ask for a short answer.")
@click.option("--compress", help="Remove vision tokens inside the language model: dart, fastv, pyramiddrop or random.")
@click.option("--keep", type=int, help="Vision tokens to keep per image; pyramiddrop has a default.")
@click.option(
    "--compress-layer", type=int, help="First layer that sees only the kept tokens; default 2 (pyramiddrop: 0)."
)
@click.option(
    "--vision-tokens", type=int, help="Vision tokens per image, for a student with compressor mqt; default: as trained."
)
@click.option("--out", type=A_FILE, help="Also write the scores to this file; reports read RUN/scores.json.")
@click.option("--answers", type=A_FILE, help="Write every answer to this file, one JSON object per line.")
@trust_option
@device_option
@json_option
def evaluate(
    model: str,
    data: str,
    image_root: str | None,
    template: str | None,
    follow_links: bool | None,
    limit: int | None,
    metric: str,
    out: str | None,
    answers: str | None,
    trust_remote_code: bool | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Score a student or teacher on held-out questions: exact match and other metrics by family, and nll of the expected answers.
    MODEL: a run (its last stage), a stage, a model folder, or a hub id."""
    from pipelines.export.provenance import find_model, trained_template
    from pipelines.judge.evaluation.kept import partial_of
    from pipelines.judge.evaluation.run import evaluate_folder, figures
    from pipelines.judge.evaluation.score import answer_row
    from pipelines.terminal.progress import bar
    from pipelines.terminal.tables import lost_rows, score_table
    from pipelines.train.run_records import finite, write_record
    from teacher_cache.sources import DataSpec
    from teacher_cache.whole_file import refuse_unwritable, write_whole

    metrics = split(metric) or ()
    for path in filter(None, (out, answers)):
        refuse_unwritable(Path(path))
    kept_in = partial_of(answers, out)
    model = str(find_model(Path(model))) if Path(model).is_dir() else model
    template = template or trained_template(model) or DataSpec.template
    with bar(console(), "questions") as progress:
        task = progress.add_task("asking", total=None)
        spec = DataSpec("heldout", data, image_root, template=template, limit=limit, follow_links=bool(follow_links))
        result = evaluate_folder(
            model,
            spec,
            trust_remote_code=bool(trust_remote_code),
            metrics=metrics,
            advance=lambda rows: progress.advance(task, rows),
            kept_in=kept_in,
            **how,
        )
    given, scores = [answer_row(one, metrics) for one in result["answers"]], figures(result)
    if out:
        write_record(Path(out), {model: scores})
    if answers:
        write_whole(Path(answers), "".join(json.dumps(finite(one), ensure_ascii=False) + "\n" for one in given))
    if kept_in:
        kept_in.path.unlink(missing_ok=True)
    if scores["n"] < MOST_ASKED * scores["rows"]:
        note(f"note: {lost_rows(scores['rows'], scores['n'], result['skips'][0])}")
    say(json.dumps(finite({**result, "answers": given})) if as_json else score_table({model: scores}))


@command("eval-tasks")
def evaluation_tasks() -> None:
    """Print the folder of the task groups for lmms-eval: ``python -P -m lmms_eval … --include_path "$(kdcli eval-tasks)"``."""
    from pipelines.lmms import TASKS

    say(str(TASKS))


@command()
@click.option("--cache", "cache_url", help="Cache to compare.")
@click.option("--teacher", help="Model folder or hub id of the cache's teacher.")
@click.option("--student", help="Student whose gradients are compared; default: that of kd.toml.")
@click.option(
    "--samples", default=32, show_default=True, help="Number of rows of the cache to compare, evenly over its shards."
)
@click.option("--parts", help="Parts to compare, comma-separated; default: those with a field.")
@click.option("--stage", default="DFT", show_default=True, help="Stage whose trained modules have gradients.")
@click.option("--dtype", help="Dtype of the live teacher; default: as in the capture.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--sweep", is_flag=True, help="Also fit many other fields on other rows, and measure bytes against fidelity."
)
@click.option("--plot", type=A_FILE, help="Write a PNG of bytes against gradient angle.")
@click.option(
    "--out", type=A_FILE, help="Also write the tables to this file as Markdown, or all numbers if it ends in .json."
)
@trust_option
@device_option
@config_option
@json_option
def fidelity(
    cache_url: str | None,
    teacher: str | None,
    student: str | None,
    parts: str | None,
    plot: str | None,
    out: str | None,
    trust_remote_code: bool | None,
    device: str | None,
    config: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compare cached losses and gradients with the live teacher, for every method, beside the live-vs-live noise floor."""
    from pipelines.judge import fidelity as pipeline
    from pipelines.judge.fidelity import show
    from pipelines.train.run_records import finite
    from teacher_cache.errors import KdcliError
    from teacher_cache.whole_file import refuse_unwritable

    settings = load(config)
    url, spec = cache_url or settings.cache, teacher_spec(teacher, settings.teacher, trust_remote_code, device=device)
    if not url or not spec:
        raise KdcliError("name both sides: --cache and --teacher, or run `kdcli init` and edit kd.toml")
    for path in filter(None, (plot, out)):
        refuse_unwritable(Path(path))
    names = tuple(one.strip() for one in parts.split(",")) if parts else None
    trained = train_settings(settings.train, student, trust_remote_code)
    request = pipeline.FidelityRequest(
        url, spec, trained.student, parts=names, trust_remote_code=trained.trust_remote_code, **asked
    )
    with show.fidelity_progress(console()) as progress:
        result = pipeline.fidelity(request, progress)
    pipeline.write_files(result, plot, out)
    say(json.dumps(finite(result)) if as_json else show.report(result))


@command()
@click.argument("runs", nargs=-1, required=True, type=A_PATH)
@click.option(
    "--cache", "cache_url", help="Cache whose sizes and decoded images are shown; default: that of kd.toml; '': none."
)
@click.option("--fidelity", multiple=True, help="File of `kdcli fidelity --out X.json`, or folder of a preflight.")
@click.option(
    "--matching/--no-matching", default=True, show_default=True, help="Show the matched tokens of em-kd students."
)
@click.option("--out", type=A_FILE, default="report.html", show_default=True)
@config_option
def report(
    runs: tuple[str, ...],
    cache_url: str | None,
    fidelity: tuple[str, ...],
    matching: bool,
    out: str,
    config: str | None,
) -> None:
    """Write one self-contained HTML page: results, losses, costs, cache sizes, fidelity, images with words, matched tokens."""
    from pipelines.judge.preflight.request import beside
    from pipelines.report.page import write_report

    settings = load(config)
    cache_url = settings.cache if cache_url is None else cache_url
    if not fidelity and cache_url == settings.cache and settings.capture.calibration:
        fidelity = tuple(beside(settings.capture.calibration))  # the preflight that chose this cache's parameters
    paths = [Path(run) for run in runs]
    say(f"wrote {write_report(paths, cache_url, Path(out), fidelity=fidelity, matching=matching)}")


@command("export")
@click.argument("source", type=A_PATH)
@click.option("--to", "target", type=click.Choice(["hf"]), default="hf", show_default=True, help="Output format.")
@click.option("--out", required=True, type=A_FOLDER, help="Output folder; it must be empty or not exist.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the weights; default: that of the student's folder (usually float32).",
)
@click.option(
    "--vision-tokens", type=int, help="Vision tokens per image, for a student with compressor mqt; default: as trained."
)
@click.option(
    "--check",
    is_flag=True,
    help="Load the export in a fresh process and compare; exit status 1 on a difference.",
)
@click.option(
    "--scores", type=A_FILE, help="Scores file of `kdcli eval --out` for the model card; default: RUN/scores.json."
)
@json_option
def export_model(
    source: str,
    target: str,
    out: str,
    dtype: str | None,
    vision_tokens: int | None,
    check: bool,
    scores: str | None,
    as_json: bool,
) -> None:
    """Write a student as a folder that plain transformers loads. SOURCE: a run (its last stage), a stage, or a model folder."""
    from pipelines.export.run import ExportRequest, export
    from pipelines.terminal.tables import export_lines

    result = export(
        ExportRequest(Path(source), Path(out), dtype, vision_tokens, check, Path(scores) if scores else None)
    )
    say(json.dumps({"to": target, **result}) if as_json else export_lines(result))
