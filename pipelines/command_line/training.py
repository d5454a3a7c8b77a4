"""Students from a cache: one, or a grid of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import load, parse_knobs, train_settings
from pipelines.command_line.options import A_FILE, A_FOLDER, config_option, json_option, trust_option
from pipelines.command_line.output import console, note, say
from pipelines.command_line.tour import command


@command("train-student")
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


@command()
@click.argument("grid", metavar="GRID.toml", type=A_FILE)
@click.option(
    "--out", type=A_FOLDER, help="Folder of cells, shared stages and results; default: ablations/NAME of the grid."
)
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
    from teacher_cache.stopping import Stopped

    request = pipeline.AblateRequest(Path(grid), Path(out or Path("ablations") / Path(grid).stem), **asked)
    if dry_run:
        listed, text = pipeline.dry_run(request)
        say(json.dumps(listed) if as_json else text)
        return
    try:
        result = pipeline.ablate(request, console())
    except KeyboardInterrupt:
        raise click.ClickException("interrupted: run the same command again to continue") from None
    except Stopped as stop:
        raise Stopped(stop.number, "run the same command again to continue") from None
    text = result.pop("markdown")
    say(json.dumps(result) if as_json else text)
    for one in result["failed"]:
        say(f"failed: {one['name']}: {one['error']} (log: {one['log']})", err=True)
    if result["failed"]:
        sys.exit(1)
