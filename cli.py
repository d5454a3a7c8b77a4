"""kdcli: run the teacher once, train every student from disk. Each command builds a config and calls one pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

import pipelines.quiet_threads  # noqa: F401 (before any command imports torch)
from pipelines.command_line.tour import TourGroup


class Group(TourGroup):
    """Prints the project's own errors as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        from teacher_cache.errors import KdcliError, one_line

        try:
            return super().invoke(ctx)
        except KdcliError as error:
            raise click.ClickException(one_line(error)) from None
        except OSError as error:
            if error.filename is None or not error.strerror:
                raise
            raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from None


def say(text: str, err: bool = False) -> None:
    """Print a result; what data brought into it (captions, ids, names) cannot drive the terminal."""
    from teacher_cache.errors import printable

    click.echo(printable(text), err=err)


def note(text: str) -> None:
    """A note beside the progress bars."""
    from teacher_cache.errors import printable

    console().print(printable(text), markup=False, highlight=False)


def console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def load(config: str | None) -> Any:
    from pipelines.settings import load_settings

    return load_settings(Path(config) if config else None)


config_option = click.option(
    "--config", type=click.Path(dir_okay=False), help="Settings file; default: ./kd.toml where it exists."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
device_option = click.option("--device", default=None, help="cpu, cuda, cuda:1; default: the GPU where there is one.")
backend_options = [
    click.option("--backend", type=click.Choice(["transformers", "vllm"]), help="What runs the teacher (README.md)."),
    click.option(
        "--vllm-route",
        type=click.Choice(["hidden", "logprobs"]),
        help="What vLLM is asked for; logprobs: top-k alone, with an inexact tail.",
    ),
]
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    default=None,
    help="Run program code that models' folders bring (docs/security.md); off by default.",
)
links_option = click.option(
    "--follow-links",
    is_flag=True,
    default=None,
    help="Links below an image root may lead out of it: they are yours (docs/security.md).",
)
data_options = [
    click.option("--data", multiple=True, help="Mixture part: file, glob or brace URL. Repeat for more parts."),
    click.option(
        "--part", multiple=True, help="Name of each --data part, in order (default: the stem of its file name)."
    ),
    click.option("--image-root", multiple=True, help="Folder of relative image paths, once for all or once a --data."),
    links_option,
    click.option(
        "--template", multiple=True, help="chat, plain, v1 or qwen_1_5, once for all or once a --data (default chat)."
    ),
    click.option("--limit", multiple=True, type=int, help="Use only the first N rows, once for all or once a --data."),
]


def with_data_options(command: Any) -> Any:
    for option in reversed(data_options):
        command = option(command)
    return command


def with_backend_options(command: Any) -> Any:
    for option in reversed(backend_options):
        command = option(command)
    return command


def teacher_spec(teacher: str | None, known: Any, trust_remote_code: bool | None, **flags: Any) -> Any:
    """The teacher of a command: ``--teacher``, else that of kd.toml, whose trust does not go over to another model; None: neither."""
    from pipelines.settings import override
    from teacher_cache.teachers.transformers import TeacherSpec

    spec = TeacherSpec(teacher) if teacher else known
    return override(spec, trust_remote_code=trust_remote_code, **flags) if spec else None


def train_settings(known: Any, student: str | None, trust_remote_code: bool | None, **flags: Any) -> Any:
    """``[train]`` with what the flags say; trust in the student of kd.toml does not go over to another one."""
    from pipelines.settings import override

    if student and student != known.student:
        trust_remote_code = bool(trust_remote_code)
    return override(known, student=student, trust_remote_code=trust_remote_code, **flags)


def need(given: dict[str, Any]) -> None:
    """KdcliError naming the first flag that neither the command line nor kd.toml gave."""
    from teacher_cache.errors import KdcliError

    for name, value in given.items():
        if not value:
            raise KdcliError(f"no {name}: give the flag, or run `kdcli init` and edit kd.toml")


def data_specs(data: tuple[str, ...], follow_links: bool | None = None, **each: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flags → one DataSpec a part; an option is given once for all parts or once for each, ``follow_links`` for all."""
    from pipelines.settings import build
    from teacher_cache.errors import KdcliError
    from teacher_cache.sources import DataSpec

    specs = []
    for i, path in enumerate(data):
        values: dict[str, Any] = {"path": path, "follow_links": bool(follow_links)}
        for name, given in each.items():
            if given and len(given) not in (1, len(data)):
                raise KdcliError(
                    f"--{name.replace('_', '-')} was given {len(given)} times for {len(data)} --data: once, or once each"
                )
            if given:
                values[name] = given[i if len(given) > 1 else 0]
        # The names that the training stages read: captions are plain, everything else is instruction tuning.
        values.setdefault("part", "caption" if values.get("template") == "plain" else "sft")
        specs.append(build(DataSpec, values, f"--data {path}"))
    return tuple(specs)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="kdcli")
def main() -> None:
    """Run the multimodal teacher once, write down what students need, train as many students as you like from disk.

    \b
    Every command has -h, with an example. What a kd.toml says (`kdcli init` writes one), flags say otherwise.
    Long commands continue when they are run again.
    """


@main.command()
@click.option("--out", default="demo-run", show_default=True, help="Folder for world, cache, students and report.")
@click.option("--seed", default=0, show_default=True)
def demo(out: str, seed: int) -> None:
    """The whole loop on a small rendered world: data → cache → students → table + HTML report."""
    from pipelines.demo.run import run_demo

    run_demo(Path(out), seed, console())


@main.command()
def init() -> None:
    """Write a commented kd.toml into the current folder."""
    from pipelines.settings import write_template

    target = write_template(Path("."))
    say(
        f"wrote {target}: edit teacher, student and data, then run `kdcli doctor` and `kdcli cache-teacher --shards 512`"
    )


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, flags, methods and fields in a shell.

    \b
    bash:  kdcli completion bash > ~/.kdcli-complete.sh, then `source ~/.kdcli-complete.sh` in ~/.bashrc
    zsh:   kdcli completion zsh > ~/.kdcli-complete.zsh, then `source ~/.kdcli-complete.zsh` in ~/.zshrc
    fish:  kdcli completion fish > ~/.config/fish/completions/kdcli.fish
    """
    from pipelines.command_line.completion import script

    click.echo(script(main, shell))


@main.command()
@click.argument("paths", nargs=-1)
@with_data_options
@click.option("--teacher", help="Model folder or hub id: also find rows over --max-length in its tokens.")
@click.option("--max-length", type=int, help="Longest row in tokens (default: as in [capture]).")
@trust_option
@config_option
@json_option
def doctor(
    paths: tuple[str, ...],
    data: tuple[str, ...],
    teacher: str | None,
    max_length: int | None,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **each: Any,
) -> None:
    """List the defects of a mixture by kind, with row numbers. PATHS: files or globs; default: the parts of kd.toml."""
    from pipelines.doctor import examine, print_report
    from pipelines.progress import doctor_progress
    from pipelines.settings import override
    from teacher_cache.errors import KdcliError
    from teacher_cache.prepare import token_counter
    from teacher_cache.teachers.backends import load_processor

    settings = load(config)
    given = data_specs(paths + data, **each)
    specs = given or settings.data
    if not specs:
        raise KdcliError(
            "no data: name files (`kdcli doctor rows.json --image-root images`), or run `kdcli init` for a kd.toml"
        )
    spec = teacher_spec(teacher, None if given else settings.teacher, trust_remote_code)
    limit = override(settings.capture, max_length=max_length).max_length
    count = token_counter(*load_processor(spec), {one.part: one.template for one in specs}) if spec else None
    with doctor_progress(console()) as progress:
        report = examine(list(specs), progress, token_counter=count, max_length=limit)
    if as_json:
        say(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        from rich.console import Console

        print_report(report, Console())


@main.command("plan")
@click.option("--teacher", help="Model folder or hub id; its configuration and processor are read, no weights.")
@with_data_options
@click.option(
    "--rows", multiple=True, metavar="[PART=]N", help="Rows of the whole mixture, of which --data holds a few."
)
@click.option("--sample", default=512, show_default=True, type=click.IntRange(1), help="Rows to prepare.")
@click.option("--like", help="A cache of the same settings (a few hundred rows) whose bytes a row are taken.")
@click.option("--shards", type=int, help="Number of shards.")
@click.option("--store", help="compact (top-k), standard (head + sketch + affinity) or exact (bf16 hidden states).")
@click.option("--fields", help="Single fields instead of a profile, comma-separated.")
@click.option("--k", "k", type=int, help="k of the top-k fields.")
@click.option("--codec", help="Codec of the hidden fields: sketch, bf16, int8, int4 or fp32.")
@click.option("--parts-without-fields", help="Parts of which only the samples are stored, comma-separated.")
@click.option("--max-length", type=int, help="Longest row in tokens.")
@click.option("--over-length", type=click.Choice(["skip", "cut"]), help="What to do with longer rows.")
@click.option("--tokens-per-second", type=float, help="Measured speed of one GPU, text and vision tokens.")
@click.option("--peak-tflops", default=989.0, show_default=True, help="Of one GPU, where no speed is given.")
@click.option("--utilisation", default=0.4, show_default=True, help="Share of the peak that is reached.")
@click.option("--gpus", default=8, show_default=True, help="GPUs of the job.")
@trust_option
@config_option
@json_option
def plan_capture(
    teacher: str | None,
    data: tuple[str, ...],
    rows: tuple[str, ...],
    sample: int,
    like: str | None,
    fields: str | None,
    k: int | None,
    codec: str | None,
    parts_without_fields: str | None,
    tokens_per_second: float | None,
    peak_tflops: float,
    utilisation: float,
    gpus: int,
    trust_remote_code: bool | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Before the job: rows, tokens, bytes by column, shards and hours, from a few real rows and no weights."""
    from pipelines.estimate.mixture_sample import parse_rows
    from pipelines.estimate.report import estimate_tables
    from pipelines.estimate.run import PlanRequest, estimate
    from pipelines.estimate.teacher_cost import Speed
    from pipelines.progress import bar
    from pipelines.settings import override

    settings = load(config)
    each = {name: flags.pop(name) for name in ("part", "image_root", "follow_links", "template", "limit")}
    specs = data_specs(data, **each) or settings.data
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code)
    need({"--teacher": spec, "--data": specs})
    capture = override(
        settings.capture, fields=split(fields), parts_without_fields=split(parts_without_fields), **flags
    )
    counts = parse_rows(rows, [one.part for one in specs])
    speed = Speed(tokens_per_second, peak_tflops, utilisation, gpus)
    params = field_params(settings, capture, k, codec)
    request = PlanRequest(spec, specs, capture, params, counts, sample, like, speed)
    with bar(console(), "rows") as progress:
        task = progress.add_task("looking at rows", total=None)
        result = estimate(request, lambda done, total: progress.update(task, completed=done, total=total))
    say(json.dumps(result.to_json(), ensure_ascii=False) if as_json else estimate_tables(result))


@main.command()
@click.option("--teacher", help="Model folder or hub id.")
@click.option("--student", help="Model folder or hub id that will be trained.")
@with_data_options
@click.option("--methods", default="llava-kd,kd", show_default=True, help="Methods to try, comma-separated.")
@click.option("--rows", default=256, show_default=True, help="Rows of the mixture; a third is held out to judge.")
@click.option("--out", default="preflight", show_default=True, help="Folder or URL; the rows' cache is OUT/cache.")
@click.option("--store", help="compact, standard (whose fineness is chosen) or exact.")
@click.option("--fields", help="Single fields instead of a profile, comma-separated.")
@click.option("--shards", type=int, help="Number of shards of the real job.")
@click.option("--max-length", type=int, help="Longest row in tokens.")
@click.option("--max-angle", default=1.0, show_default=True, help="Degrees between whole gradients, cache and live.")
@click.option("--max-kl", default=0.005, show_default=True, help="Nats between stored and live distributions, mean.")
@click.option("--max-bytes", type=int, help="Most bytes of all fields together, a sample.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write what was chosen into kd.toml.")
@click.option("--gpus", default=8, show_default=True, help="GPUs of the real job.")
@click.option("--dtype", help="auto, float32, bfloat16, float16.")
@with_backend_options
@trust_option
@device_option
@config_option
@json_option
def preflight(
    teacher: str | None,
    student: str | None,
    data: tuple[str, ...],
    methods: str,
    store: str | None,
    fields: str | None,
    shards: int | None,
    max_length: int | None,
    write: bool,
    dtype: str | None,
    backend: str | None,
    vllm_route: str | None,
    trust_remote_code: bool | None,
    device: str | None,
    config: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Go or no-go before the job: a few hundred rows through the cache and the actual student. Exit status 1: no-go."""
    from dataclasses import replace

    from pipelines.preflight import report
    from pipelines.preflight.request import PreflightRequest
    from pipelines.preflight.run import preflight as run
    from pipelines.settings import FILE, override

    settings = load(config)
    each = {name: asked.pop(name) for name in ("part", "image_root", "follow_links", "template", "limit")}
    specs = data_specs(data, **each) or settings.data
    run_by = {"dtype": dtype, "device": device, "backend": backend, "vllm_route": vllm_route}
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **run_by)
    need({"--teacher": spec, "--data": specs})
    capture = override(
        settings.capture, store=store, fields=split(fields), shards=shards, max_length=max_length, workers=1
    )
    settings = replace(settings, capture=capture, train=train_settings(settings.train, student, trust_remote_code))
    kd_file = Path(config or FILE) if write else None
    request = PreflightRequest(spec, specs, settings, split(methods) or (), kd_file=kd_file, **asked)
    with report.preflight_progress(console()) as progress:
        result = run(request, progress)
    say(json.dumps(report.as_json(result), ensure_ascii=False) if as_json else report.report(result))
    if not result["go"]:
        sys.exit(1)


@main.command("cache-teacher")
@click.option("--teacher", help="Model folder or hub id; null:FOLDER makes signals up (docs/scaling.md).")
@with_data_options
@click.option("--out", help="Where the cache goes: a folder or an fsspec URL.")
@click.option("--shards", type=int, help="Number of shards, fixed for the life of the cache.")
@click.option("--store", help="compact (top-k), standard (head + sketch + affinity) or exact (bf16 hidden states).")
@click.option("--fields", help="Single fields instead of a profile, comma-separated (see `kdcli methods`).")
@click.option("--k", "k", type=int, help="k of the top-k fields.")
@click.option("--codec", help="Codec of the hidden fields: sketch, bf16, int8, int4 or fp32.")
@click.option("--parts-without-fields", help="Parts of which only the samples are stored, comma-separated.")
@click.option("--max-length", type=int, help="Longest row in tokens.")
@click.option("--over-length", type=click.Choice(["skip", "cut"]), help="What to do with longer rows.")
@click.option("--executor", help="local, ray or slurm: who schedules the shards (docs/scaling.md).")
@click.option("--workers", type=int, help="Worker processes or Ray actors; default one a GPU.")
@click.option("--ray-address", help="A running Ray cluster, e.g. auto; default: RAY_ADDRESS, else this machine.")
@click.option("--slurm-tasks", type=int, help="Tasks of the Slurm array.")
@click.option("--slurm-options", help="Options of sbatch, e.g. '--partition=gpu --gres=gpu:1'.")
@click.option("--dry-run", is_flag=True, help="With --executor slurm: print the scripts, submit nothing.")
@click.option("--part-of-shards", metavar="I/N", help="Only shards whose number leaves I when divided by N.")
@click.option("--prepare-only", is_flag=True, help="Plan, calibrate and describe; leave every shard to others.")
@click.option("--batch-tokens", type=int, help="Padded tokens of one teacher batch.")
@click.option("--calibration-rows", type=int, help="Rows the teacher reads before the job, to fit codecs.")
@click.option("--calibration", help="Cache of `kdcli preflight` whose calibration is taken; '' fits afresh.")
@click.option("--staging-gb", type=float, help="Most local temporary disk (TMPDIR) of a worker; for object stores.")
@click.option("--seed", type=int, help="Seed of the row order.")
@click.option("--dtype", help="auto, float32, bfloat16, float16.")
@with_backend_options
@trust_option
@device_option
@config_option
@json_option
def cache_teacher(
    teacher: str | None,
    data: tuple[str, ...],
    out: str | None,
    fields: str | None,
    k: int | None,
    codec: str | None,
    parts_without_fields: str | None,
    slurm_options: str | None,
    dry_run: bool,
    part_of_shards: str | None,
    prepare_only: bool,
    dtype: str | None,
    backend: str | None,
    vllm_route: str | None,
    trust_remote_code: bool | None,
    device: str | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run the teacher over every row once and write the cache. Run it again to continue."""
    import shlex
    from dataclasses import replace

    from pipelines import cache_teacher as pipeline
    from pipelines.progress import capture_progress
    from pipelines.settings import override

    settings = load(config)
    each = {name: flags.pop(name) for name in ("part", "image_root", "follow_links", "template", "limit")}
    specs = data_specs(data, **each) or settings.data
    run_by = {"dtype": dtype, "device": device, "backend": backend, "vllm_route": vllm_route}
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **run_by)
    target = out or settings.cache
    need({"--teacher": spec, "--data": specs, "--out": target})
    capture = override(
        settings.capture,
        fields=split(fields),
        parts_without_fields=split(parts_without_fields),
        slurm_options=tuple(shlex.split(slurm_options)) if slurm_options is not None else None,
        **flags,
    )
    if capture.executor == "slurm":
        submit_to_slurm(capture, dry_run)
        return
    if dry_run:
        raise click.UsageError("--dry-run prints Slurm's scripts: give --executor slurm with it")
    params = field_params(settings, capture, k, codec)
    request = pipeline.CaptureRequest(
        replace(spec),
        specs,
        target,
        capture,
        params,
        part_of_shards=part_of(part_of_shards),
        prepare_only=prepare_only,
    )
    with capture_progress(console()) as progress:
        summary = pipeline.capture(request, progress)
    if as_json:
        say(json.dumps(summary))
    else:
        from pipelines.tables import cache_table

        say(cache_table(summary["columns"], summary["rows"]))
        shards = f"{summary['shards']} shard{'s' * (summary['shards'] != 1)}"
        say(f"{summary['rows']} rows in {shards} at {target}; plan {summary['plan_hash'][:12]}")
        for note in summary.get("notes", []):
            say(f"note: {note}")


def part_of(text: str | None) -> tuple[int, int] | None:
    """``3/64`` → (3, 64)."""
    from teacher_cache.errors import KdcliError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise KdcliError(f"--part-of-shards is I/N, e.g. 3/64, got {text!r}")
    return int(number), int(count)


SCHEDULING = {"executor", "slurm_tasks", "slurm_options", "dry_run", "ray_address", "part_of_shards", "prepare_only"}


def submit_to_slurm(capture: Any, dry_run: bool) -> None:
    """The command as it was given, without what says how it is scheduled, as the task of an array."""
    from pipelines.executors.slurm import SlurmJob

    program = [sys.argv[0]] if Path(sys.argv[0]).name == "kdcli" else [sys.executable, "-m", "cli"]
    command = [*program, "cache-teacher", *given_again(click.get_current_context(), SCHEDULING)]
    folder = Path("slurm")
    job = SlurmJob(command, capture.slurm_tasks, capture.slurm_options, folder, Path.cwd())
    if dry_run:
        say(job.plan())
        return
    first, array = job.submit()
    say(
        f"submitted: {first} prepares, then array {array} with {job.tasks} tasks; scripts and logs in {folder}/\n"
        "`kdcli cache status` shows how far it is"
    )


def given_again(context: click.Context, leave_out: set[str]) -> list[str]:
    """The flags of a command as they were given, in the order of its options."""
    words = []
    for option in context.command.params:
        name = str(option.name)
        if name in leave_out or context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for one in value if isinstance(value, tuple) else (value,):
            words += [option.opts[-1]] if one is True else [option.opts[-1], str(one)]
    return words


def field_params(settings: Any, capture: Any, k: int | None, codec: str | None) -> dict[str, dict[str, Any]]:
    """``[fields.NAME]`` of kd.toml for the captured fields, with ``--k`` and ``--codec`` over it."""
    from pipelines.profiles import chosen_fields

    captured = chosen_fields(capture.store, capture.fields, {})
    params = {name: dict(value) for name, value in settings.fields.items() if name in captured}
    for name in captured:
        if k is not None and name.endswith("_topk"):
            params[name] = {**params.get(name, {}), "k": k}
        if codec is not None and name.endswith("_hidden"):
            params[name] = {**params.get(name, {}), "codec": codec}
    return params


def split(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text is not None else None


@main.group("cache")
def cache_group() -> None:
    """Look at a cache and change it: its fields, its rows, its garbage."""


def named_cache(url: str | None, config: str | None) -> str:
    from teacher_cache.errors import KdcliError

    url = url or load(config).cache
    if not url:
        raise KdcliError("no cache: name it (`kdcli cache status CACHE`), or run `kdcli init` for a kd.toml")
    return url


def open_cache(url: str | None, config: str | None) -> Any:
    from student_train.cache import Cache

    return Cache(named_cache(url, config))


@cache_group.command()
@click.argument("url", required=False)
@click.option("--row", default=0, show_default=True, help="Which sample, counted from 0.")
@click.option("--key", help="Which sample, by its key.")
@config_option
def inspect(url: str | None, row: int, key: str | None, config: str | None) -> None:
    """One sample as words: what each vision patch and each response position says, and its bytes by field."""
    from pipelines import inspect_cache
    from pipelines.tables import sample_view

    cache = open_cache(url, config)
    say(sample_view(inspect_cache.inspect(cache, row, key)))


@cache_group.command()
@click.argument("url", required=False)
@config_option
@json_option
def status(url: str | None, config: str | None, as_json: bool) -> None:
    """Shards done, rows, skips by reason, bytes by field; while a capture runs, also its workers, their rate and the time left."""
    from pipelines import inspect_cache
    from pipelines.tables import cache_table, work_lines

    body = inspect_cache.status(open_cache(url, config))
    if as_json:
        say(json.dumps(body))
        return
    say(cache_table(body["columns"], body["rows"]))
    if body["work"]:
        say(work_lines(body["work"]))


@cache_group.command()
@click.argument("url", required=False)
@config_option
@json_option
def verify(url: str | None, config: str | None, as_json: bool) -> None:
    """Check every checksum. Exit status 1 where anything is damaged or missing."""
    from pipelines import inspect_cache

    _, problems = inspect_cache.survey(named_cache(url, config))
    if as_json:
        say(json.dumps([vars(problem) for problem in problems]))
    else:
        for problem in problems:
            say(str(problem))
        say(f"{count_problems(problems)}: `kdcli cache repair` mends damage" if problems else "every checksum holds")
    if problems:
        sys.exit(1)


def count_problems(problems: Any) -> str:
    return f"{len(problems)} problem{'s' * (len(problems) != 1)}"


@cache_group.command()
@click.argument("url", metavar="CACHE", required=False)
@click.option("--teacher", help="Model folder or hub id that made the cache.")
@with_data_options
@click.option("--dry-run", is_flag=True, help="List what is damaged and from what it would be made again.")
@click.option("--replace", is_flag=True, help="Take shards that come out with other bytes than those that stood there.")
@click.option("--shards", type=int, help="As in the capture; for a lost manifest.")
@click.option("--seed", type=int, help="As in the capture; for a lost manifest.")
@click.option("--max-length", type=int, help="As in the capture; for a lost manifest.")
@click.option("--over-length", type=click.Choice(["skip", "cut"]), help="As in the capture; for a lost manifest.")
@click.option("--store", help="As in the capture; for a lost field.json.")
@click.option("--fields", help="As in the capture; for a lost field.json.")
@click.option("--k", "k", type=int, help="As in the capture; for a lost field.json.")
@click.option("--codec", help="As in the capture; for a lost field.json.")
@click.option("--set", "knobs", multiple=True, metavar="FIELD.NAME=VALUE", help="A parameter of a lost field.json.")
@click.option("--calibration-rows", type=int, help="As in the capture; for lost calibrations.")
@click.option("--calibration", help="Cache whose calibrations are the lost ones: of the preflight, or a copy.")
@click.option("--workers", type=int, help="Worker processes; default one a GPU.")
@click.option("--batch-tokens", type=int, help="Padded tokens of one teacher batch, as in the capture.")
@click.option("--dtype", help="float32, bfloat16, float16; default: as the fields that can be read.")
@with_backend_options
@device_option
@config_option
@json_option
def repair(
    url: str | None,
    teacher: str | None,
    data: tuple[str, ...],
    dry_run: bool,
    replace: bool,
    fields: str | None,
    k: int | None,
    codec: str | None,
    knobs: tuple[str, ...],
    dtype: str | None,
    backend: str | None,
    vllm_route: str | None,
    device: str | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make damaged shards and files again, those alone, with the flags of the capture. Never while a capture runs.

    Exit status 1 where something stays damaged, with the reason.
    """
    from pipelines import repair as pipeline
    from pipelines.progress import capture_progress
    from pipelines.settings import override
    from pipelines.tables import repair_lines
    from teacher_cache.teachers.transformers import TeacherSpec

    settings = load(config)
    each = {name: flags.pop(name) for name in ("part", "image_root", "follow_links", "template", "limit")}
    specs = data_specs(data, **each) or settings.data
    spec = TeacherSpec(teacher) if teacher else settings.teacher
    run_by = {"dtype": dtype, "device": device, "backend": backend, "vllm_route": vllm_route}
    spec = override(spec, **run_by) if spec else None
    capture = override(settings.capture, fields=split(fields), **flags)
    params = {**settings.fields, **field_params(settings, capture, k, codec)}
    for name, value in parse_knobs(knobs).items():
        field, _, parameter = name.rpartition(".")
        params[field] = {**params.get(field, {}), parameter: value}
    request = pipeline.RepairRequest(named_cache(url, config), spec, specs, capture, params, replace)
    with capture_progress(console()) as progress:
        result = pipeline.repair(request, dry_run, progress)
    say(json.dumps(result) if as_json else repair_lines(result, dry_run))
    if result["left"] and not dry_run:
        sys.exit(1)


@cache_group.command()
@click.argument("url", required=False)
@click.option("--yes", is_flag=True, help="Remove them; without it they are only listed. Never while a capture runs.")
@config_option
def gc(url: str | None, yes: bool, config: str | None) -> None:
    """List or remove files that no commit names (left by killed or second writers)."""
    from pipelines import inspect_cache

    found = inspect_cache.collect_garbage(open_cache(url, config), remove=yes)
    for name in found:
        say(name)
    say(f"{len(found)} files {'removed' if yes else 'would be removed (--yes)'}")


@cache_group.command("add-field")
@click.argument("url", metavar="CACHE", required=False)
@click.option("--field", "names", multiple=True, required=True, help="A field to add; repeat for more.")
@click.option(
    "--set", "knobs", multiple=True, metavar="[FIELD.]NAME=VALUE", help="Its parameter, e.g. --set codec=int8."
)
@click.option("--teacher", help="Model folder or hub id.")
@click.option(
    "--other-teacher", is_flag=True, help="Another teacher than that of the other fields, of the same vocabulary."
)
@click.option("--parts-without-fields", help="Parts that do not get the field, comma-separated.")
@click.option("--workers", type=int, help="Worker processes; default one a GPU.")
@click.option("--batch-tokens", type=int, help="Padded tokens of one teacher batch.")
@click.option("--calibration-rows", type=int, help="Rows the teacher reads before the job, to fit codecs.")
@click.option("--calibration", help="A cache (of `kdcli preflight`, or any) whose calibration to take; '' fits afresh.")
@click.option("--dtype", help="float32, bfloat16, float16; default: as the other fields.")
@with_backend_options
@trust_option
@device_option
@config_option
@json_option
def add_field(
    url: str | None,
    names: tuple[str, ...],
    knobs: tuple[str, ...],
    teacher: str | None,
    other_teacher: bool,
    parts_without_fields: str | None,
    dtype: str | None,
    backend: str | None,
    vllm_route: str | None,
    trust_remote_code: bool | None,
    device: str | None,
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Capture further fields of a cache from its own samples; the mixture is not needed. Run it again to continue."""
    from pipelines import edit_cache as pipeline
    from pipelines.progress import capture_progress
    from pipelines.settings import override

    settings = load(config)
    cache = open_cache(url, config)
    run_by = {"dtype": dtype, "device": device, "backend": backend, "vllm_route": vllm_route}
    spec = teacher_spec(teacher, settings.teacher, trust_remote_code, **run_by)
    need({"--teacher": spec})
    given = pipeline.parse_field_sets(names, parse_knobs(knobs))
    params = {name: {**settings.fields.get(name, {}), **given[name]} for name in names}
    capture = override(settings.capture, parts_without_fields=split(parts_without_fields), **flags)
    with capture_progress(console()) as progress:
        summary = pipeline.add_fields(str(cache.storage), spec, params, capture, other_teacher, progress)
    print_summary(summary, as_json)


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """A cache that was made or changed: as ``cache status`` says it."""
    from pipelines.tables import cache_table

    say(json.dumps(summary) if as_json else cache_table(summary["columns"], summary["rows"]))
    if not as_json:
        for note in summary.get("notes", []):
            say(f"note: {note}")


@cache_group.command("drop-field")
@click.argument("url", metavar="CACHE")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Remove it; without it nothing is touched. Never while something reads it.")
@json_option
def drop_field(url: str, name: str, yes: bool, as_json: bool) -> None:
    """Remove one field of a cache, or say what would go."""
    from pipelines.edit_cache import drop_field as drop
    from pipelines.tables import human_bytes

    found = drop(url, name, remove=yes)
    if as_json:
        say(json.dumps({**vars(found), "removed": yes}))
        return
    what = f"field {name}: {found.shards} shards, {found.files} files, {human_bytes(found.bytes)}"
    say(f"{what} {'removed' if yes else 'would be removed (--yes)'}")
    if yes:
        say("what it alone read under teacher/ goes with `kdcli cache gc --yes`")


@cache_group.command()
@click.argument("url", metavar="CACHE")
@click.option("--out", required=True, help="Where the new cache goes.")
@click.option("--parts", help="Only these parts, comma-separated.")
@click.option("--fields", help="Only these fields, comma-separated; default all.")
@click.option("--keys", type=click.Path(), help="Only the rows of this file: a key a line.")
@click.option("--with-images/--text-only", "images", default=None, help="Only rows with, or only rows without images.")
@click.option("--fraction", type=float, help="About this share of the rows, drawn by a hash of their keys.")
@click.option("--max-rows", type=int, help="At most so many rows, drawn in the same way.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--workers", default=1, show_default=True, help="Processes that copy.")
@json_option
def subset(
    url: str,
    out: str,
    parts: str | None,
    fields: str | None,
    keys: str | None,
    workers: int,
    as_json: bool,
    **rows: Any,
) -> None:
    """A new cache of some rows, parts or fields of one, without the teacher. Run it again to continue."""
    from pipelines.choose_rows import RowFilter, read_keys
    from pipelines.derive_cache import subset as pipeline
    from pipelines.progress import capture_progress

    chosen = RowFilter(keys=read_keys(keys) if keys else None, **rows)
    with capture_progress(console()) as progress:
        summary = pipeline(url, out, split(parts), split(fields), chosen, workers, progress)
    print_summary(summary, as_json)


@cache_group.command()
@click.argument("urls", metavar="CACHE CACHE…", nargs=-1, required=True)
@click.option("--out", required=True, help="Where the new cache goes.")
@click.option("--fields", help="Only these fields, comma-separated; default all.")
@click.option("--keep", type=click.Choice(["first"]), help="Rows that several hold: take those of the first cache.")
@click.option("--workers", default=1, show_default=True, help="Processes that copy.")
@json_option
def merge(urls: tuple[str, ...], out: str, fields: str | None, keep: str | None, workers: int, as_json: bool) -> None:
    """A new cache of the rows of several, of one teacher and one preparation. Run it again to continue."""
    from pipelines.derive_cache import merge as pipeline
    from pipelines.progress import capture_progress

    with capture_progress(console()) as progress:
        summary = pipeline(urls, out, split(fields), keep, workers, progress)
    print_summary(summary, as_json)


@cache_group.command()
@click.argument("url")
@click.argument("column", default="samples")
def urls(url: str, column: str) -> None:
    """Print the tar paths of a column (samples, or a field), ready for the webdataset library."""
    from teacher_cache.shards.commit import committed_shards, read_commit

    cache = open_cache(url, None)
    reader = cache.column(column)
    for shard in committed_shards(cache.storage, reader.column):
        say(f"{cache.storage}/{reader.column}/data/{read_commit(cache.storage, reader.column, shard).tar}")


@main.command("train-student")
@click.option("--method", default="llava-kd", show_default=True, help="See `kdcli methods`.")
@click.option("--student", help="Model folder or hub id to start from.")
@click.option("--cache", "cache_url", help="The cache.")
@click.option("--stages", help="E.g. DPT,SFT,DFT; default: the method's own.")
@click.option("--preset", default="paper", show_default=True, help="paper or code, where the two differ.")
@click.option("--set", "knobs", multiple=True, metavar="NAME=VALUE", help="A knob of the method, e.g. --set gamma=1.0.")
@click.option("--output-dir", help="Folder of the run.")
@click.option("--learning-rate", type=float)
@click.option("--per-device-train-batch-size", type=int)
@click.option("--gradient-accumulation-steps", type=int)
@click.option("--num-train-epochs", type=float)
@click.option("--max-steps", type=int, help="Optimizer steps a stage.")
@click.option("--warmup-ratio", type=float)
@click.option("--seed", type=int)
@click.option("--bf16/--no-bf16", default=None, help="bfloat16 mixed precision.")
@click.option("--fsdp/--no-fsdp", default=None, help="Under torchrun: shard the student over the processes (FSDP2).")
@click.option(
    "--compressor",
    help="adaptive_pool, pixel_shuffle, tokenpacker, mqt, or none (default: the method's own).",
)
@click.option("--vision-tokens", type=int, help="Of an image, behind the compressor; default a quarter.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None)
@click.option("--dataloader-num-workers", type=int)
@click.option(
    "--use-liger-kernel/--no-use-liger-kernel", default=None, help="Fused cross-entropy (CUDA, kdcli[liger])."
)
@click.option("--local-cache", help="Folder on a local disk that keeps what is read of a cache in an object store.")
@click.option("--local-cache-gb", type=float, help="Most GB that it takes (default 100).")
@click.option("--save-steps", type=int)
@click.option("--report-to", help="Trackers, comma-separated: tensorboard (default), wandb, trackio; or none.")
@trust_option
@config_option
@json_option
def train_student(
    method: str,
    cache_url: str | None,
    stages: str | None,
    preset: str,
    knobs: tuple[str, ...],
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a student from a cache, stage after stage; run it again to continue. Also under torchrun."""
    from dataclasses import replace

    from pipelines import train_student as pipeline
    from pipelines.progress import train_progress
    from teacher_cache.errors import KdcliError

    settings = load(config)
    url = cache_url or settings.cache
    if not url:
        raise KdcliError("no cache: give --cache, or run `kdcli init` and edit kd.toml")
    settings = replace(settings, train=train_settings(settings.train, **flags))
    with train_progress(console()) as on_step:
        result = pipeline.train(url, method, settings, stages, preset, parse_knobs(knobs), on_step, note)
    say(json.dumps(result) if as_json else f"student: {result['model']}")


def parse_knobs(knobs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it parses as such, else text."""
    from teacher_cache.errors import KdcliError

    parsed: dict[str, Any] = {}
    for knob in knobs:
        name, equals, value = knob.partition("=")
        if not equals:
            raise KdcliError(f"--set {knob}: write NAME=VALUE, e.g. --set gamma=1.0")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
        except (ValueError, RecursionError) as error:
            raise KdcliError(f"--set {name}=…: {error}") from None
    return parsed


@main.command()
@click.argument("grid", metavar="GRID.toml", type=click.Path(dir_okay=False))
@click.option("--out", help="Folder of cells, shared stages and results; default: ablations/NAME of the grid.")
@click.option("--devices", help="E.g. cuda:0,cuda:1, a student at a time on each; default: every GPU, else the CPU.")
@click.option("--workers", type=int, help="Students at a time on the CPU, which share its cores.")
@click.option("--only", metavar="GLOB", help="Only students whose ROW/seed-N, or whose row, fits.")
@click.option("--limit", type=click.IntRange(0), help="Train at most so many students this time.")
@click.option("--retry-failed", is_flag=True, help="Also those that failed before.")
@click.option("--losses", is_flag=True, help="The last stage's final loss terms as columns too.")
@click.option("--dry-run", is_flag=True, help="List the students and what is done; train nothing.")
@json_option
def ablate(grid: str, out: str | None, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Train many students over one cache, and compare them in one table; run it again to continue."""
    from pipelines.ablate import run as pipeline

    request = pipeline.AblateRequest(Path(grid), Path(out or Path("ablations") / Path(grid).stem), **asked)
    if dry_run:
        listed, text = pipeline.dry_run(request)
        say(json.dumps(listed) if as_json else text)
        return
    try:
        result = pipeline.ablate(request, console())
    except KeyboardInterrupt:
        raise click.ClickException("interrupted: run the same command again to continue") from None
    text = result.pop("markdown")
    say(json.dumps(result) if as_json else text)
    for one in result["failed"]:
        say(f"failed: {one['name']}: {one['error']} (log: {one['log']})", err=True)
    if result["failed"]:
        sys.exit(1)


@main.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Held-out file of single questions.")
@click.option("--image-root", default=None)
@click.option(
    "--template", default="chat", show_default=True, help="That the model was trained with: chat, v1 or qwen_1_5."
)
@links_option
@click.option("--limit", type=int, default=None)
@click.option("--batch-size", default=32, show_default=True)
@click.option(
    "--metric",
    default="exact_match",
    show_default=True,
    help="Comma-separated metrics (docs/evaluate.md).",
)
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--prompt-suffix", default="", help="A line after every question, e.g. how short an answer should be.")
@click.option("--compress", help="Remove vision tokens inside the language model: dart, fastv, pyramiddrop or random.")
@click.option("--keep", type=int, help="Vision tokens that stay of every image; pyramiddrop has a default.")
@click.option("--compress-layer", type=int, help="The first layer that sees the kept tokens only; default 2.")
@click.option("--vision-tokens", type=int, help="Of an image, for a student with compressor mqt; default: as trained.")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="Also write the scores here; RUN/scores.json is what reports read."
)
@click.option("--answers", type=click.Path(dir_okay=False), help="Write every answer here, one JSON object a line.")
@trust_option
@device_option
@json_option
def evaluate(
    model: str,
    data: str,
    image_root: str | None,
    template: str,
    follow_links: bool | None,
    limit: int | None,
    metric: str,
    out: str | None,
    answers: str | None,
    trust_remote_code: bool | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Score a student or teacher on held-out questions: exact match and other metrics by family, and nll of the expected answers."""
    from pipelines.evaluate import evaluate_folder
    from pipelines.evaluation.score import answer_row
    from pipelines.progress import bar
    from pipelines.tables import score_table
    from teacher_cache.sources import DataSpec

    metrics = split(metric)
    with bar(console(), "questions") as progress:
        task = progress.add_task("asking", total=None)
        spec = DataSpec("heldout", data, image_root, template=template, limit=limit, follow_links=bool(follow_links))
        result = evaluate_folder(
            model,
            spec,
            trust_remote_code=bool(trust_remote_code),
            metrics=metrics,
            advance=lambda rows: progress.advance(task, rows),
            **how,
        )
    given = [answer_row(one, metrics) for one in result.pop("answers")]
    if out:
        Path(out).write_text(json.dumps({model: result}, indent=1) + "\n")
    if answers:
        Path(answers).write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in given))
    say(json.dumps({**result, "answers": given}) if as_json else score_table({model: result}))


@main.command("eval-tasks")
def evaluation_tasks() -> None:
    """Print the folder of the task groups for lmms-eval: ``python -m lmms_eval … --include_path "$(kdcli eval-tasks)"``."""
    from pipelines.lmms import TASKS

    say(str(TASKS))


@main.command("export")
@click.argument("source")
@click.option("--to", "target", type=click.Choice(["hf"]), default="hf", show_default=True, help="Kind of folder.")
@click.option("--out", required=True, help="Folder to write; it must not be there yet, or be empty.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default: as the student's folder has them (training writes float32).",
)
@click.option("--vision-tokens", type=int, help="Of an image, for a student with compressor mqt; default: as trained.")
@click.option(
    "--check",
    is_flag=True,
    help="Load it in a fresh process and compare; exit status 1 where it differs.",
)
@click.option(
    "--scores", type=click.Path(dir_okay=False), help="Of `kdcli eval --out`, for the card; default: RUN/scores.json."
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
    from pipelines.export import ExportRequest, export
    from pipelines.tables import export_lines

    result = export(
        ExportRequest(Path(source), Path(out), dtype, vision_tokens, check, Path(scores) if scores else None)
    )
    say(json.dumps({"to": target, **result}) if as_json else export_lines(result))


@main.command()
@click.option("--cache", "cache_url", help="The cache.")
@click.option("--teacher", help="The model that made it.")
@click.option("--student", help="Whose gradients are compared; default: the one of kd.toml.")
@click.option("--samples", default=32, show_default=True, help="How many rows of the cache, evenly over its shards.")
@click.option("--parts", help="Mixture parts, comma-separated; default: those with a field.")
@click.option("--stage", default="DFT", show_default=True, help="Whose modules have gradients.")
@click.option("--dtype", help="Of the live teacher; default: as in the capture.")
@click.option("--seed", default=0, show_default=True)
@click.option("--sweep", is_flag=True, help="Also fit many other fields on other rows, and measure the frontier.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Write bytes against gradient angle as a PNG.")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="Also write the tables here, as Markdown; *.json: all numbers."
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
    """Cached losses and gradients against the live teacher, per method, with the live-vs-live noise floor beside them."""
    from pipelines import fidelity as pipeline
    from pipelines.fidelity import show
    from teacher_cache.errors import KdcliError

    settings = load(config)
    url, spec = cache_url or settings.cache, teacher_spec(teacher, settings.teacher, trust_remote_code, device=device)
    if not url or not spec:
        raise KdcliError("name both sides: --cache and --teacher, or run `kdcli init` and edit kd.toml")
    names = tuple(one.strip() for one in parts.split(",")) if parts else None
    trained = train_settings(settings.train, student, trust_remote_code)
    request = pipeline.FidelityRequest(
        url, spec, trained.student, parts=names, trust_remote_code=trained.trust_remote_code, **asked
    )
    with show.fidelity_progress(console()) as progress:
        result = pipeline.fidelity(request, progress)
    pipeline.write_files(result, plot, out)
    say(json.dumps(show.as_json(result)) if as_json else show.report(result))


@main.command()
@json_option
def methods(as_json: bool) -> None:
    """List the methods: what they need, which fields serve it, the paper; and what is not offered, with the reason."""
    from pipelines import method_table

    say(json.dumps(method_table.as_json()) if as_json else method_table.text())


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--cache", "cache_url", help="Its sizes and decoded images too; default: that of kd.toml; '': none.")
@click.option("--fidelity", multiple=True, help="A file of `kdcli fidelity --out X.json`, or a preflight's folder.")
@click.option("--matching/--no-matching", default=True, show_default=True, help="Match the tokens of em-kd students.")
@click.option("--out", default="report.html", show_default=True)
@config_option
def report(
    runs: tuple[str, ...],
    cache_url: str | None,
    fidelity: tuple[str, ...],
    matching: bool,
    out: str,
    config: str | None,
) -> None:
    """One self-contained HTML page: results, losses, costs, cache sizes, fidelity, images with words, matched tokens."""
    from pipelines.report.fidelity_files import beside
    from pipelines.report.page import write_report

    settings = load(config)
    cache_url = settings.cache if cache_url is None else cache_url
    if not fidelity and cache_url == settings.cache and settings.capture.calibration:
        fidelity = tuple(beside(settings.capture.calibration))  # the preflight that chose this cache's parameters
    paths = [Path(run) for run in runs]
    say(f"wrote {write_report(paths, cache_url, Path(out), fidelity=fidelity, matching=matching)}")


if __name__ == "__main__":
    main()
