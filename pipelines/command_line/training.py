"""Students from a cache: one, or a grid of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipelines.command_line.given import load, of_terms, parse_knobs, train_settings
from pipelines.command_line.options import A_FILE, A_FOLDER, config_option, json_option, trust_option
from pipelines.command_line.output import console, note, say
from pipelines.command_line.tour import command


@command("train-student")
@click.option(
    "--method", default="llava-kd", show_default=True, help="Distillation method; `kdcli methods` lists them."
)
@click.option("--student", help="Model folder or hub id to start from.")
@click.option("--cache", "cache_url", help="Cache to train from.")
@click.option("--stages", help="Stages, e.g. DPT,SFT,DFT; default: the method's own.")
@click.option(
    "--preset",
    default="default",
    show_default=True,
    help="Preset of knobs: default, paper, or code if the method has it.",
)
@click.option("--set", "knobs", multiple=True, metavar="NAME=VALUE", help="Knob of the method, e.g. --set gamma=1.0.")
@click.option(
    "--schedule",
    multiple=True,
    metavar="TERM=FORM",
    help="Schedule of a loss term's weight, e.g. --schedule vis=linear:1:0 (docs/train.md).",
)
@click.option(
    "--select",
    multiple=True,
    metavar="TERM=WHAT",
    help="Weights of rows in a loss term, e.g. --select reg=agreement (docs/train.md).",
)
@click.option(
    "--log-term-gradients", type=int, metavar="N", help="Log norms and cosines of the terms' gradients every N steps."
)
@click.option("--out", "--output-dir", "output_dir", help="Output folder of the run.")
@click.option("--learning-rate", type=float)
@click.option("--per-device-train-batch-size", type=int)
@click.option("--gradient-accumulation-steps", type=int)
@click.option("--num-train-epochs", type=float)
@click.option("--max-steps", type=int, help="Optimizer steps per stage.")
@click.option("--warmup-ratio", type=float)
@click.option("--seed", type=int)
@click.option(
    "--packing/--no-packing",
    default=None,
    help="Put several samples into one row, for less padding (default: where possible).",
)
@click.option("--bf16/--no-bf16", default=None, help="bfloat16 mixed precision.")
@click.option("--fsdp/--no-fsdp", default=None, help="Under torchrun, shard the student over the processes (FSDP2).")
@click.option(
    "--compressor",
    help="adaptive_pool, pixel_shuffle, tokenpacker, mqt, or none (default: the method's own).",
)
@click.option("--vision-tokens", type=int, help="Vision tokens per image after the compressor; default: a quarter.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None)
@click.option("--dataloader-num-workers", type=int)
@click.option(
    "--use-liger-kernel/--no-use-liger-kernel",
    default=None,
    help="Use Liger-Kernel's fused cross-entropy (CUDA, kdcli[liger]).",
)
@click.option("--local-cache", help="Folder on a local disk that keeps tars read from an object store.")
@click.option("--local-cache-gb", type=float, help="Maximum size of --local-cache in GB (default 100).")
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
    schedule: tuple[str, ...],
    select: tuple[str, ...],
    config: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a student from a cache, stage by stage. Run the command again to continue. Also runs under torchrun."""
    from dataclasses import replace

    from pipelines.terminal.progress import train_progress
    from pipelines.train import train_student as pipeline
    from teacher_cache.errors import KdcliError

    settings = load(config)
    url = cache_url or settings.cache
    if not url:
        raise KdcliError("no cache: give --cache, or run `kdcli init` and edit kd.toml")
    train = train_settings(settings.train, **flags)
    settings = replace(settings, train=of_terms(train, schedule=schedule, select=select))
    with train_progress(console()) as on_step:
        result = pipeline.train(url, method, settings, stages, preset, parse_knobs(knobs), on_step, note)
    say(json.dumps(result) if as_json else f"student: {result['model']}")


@command()
@click.argument("grid", metavar="GRID.toml", type=A_FILE)
@click.option(
    "--out",
    type=A_FOLDER,
    help="Output folder; default: ablations/ and the grid's name.",
)
@click.option(
    "--devices",
    help="Devices for one student each, e.g. cuda:0,cuda:1; default: all GPUs, else the CPU.",
)
@click.option("--workers", type=int, help="Students trained at the same time on the CPU; they share its cores.")
@click.option("--only", metavar="GLOB", help="Train only students whose row or ROW/seed-N matches.")
@click.option("--limit", type=click.IntRange(0), help="Train at most this many students now.")
@click.option("--retry-failed", is_flag=True, help="Train failed students again, too.")
@click.option("--losses", is_flag=True, help="Add the final loss terms of the last stage as columns.")
@click.option("--dry-run", is_flag=True, help="List the students and their state; train nothing.")
@json_option
def ablate(grid: str, out: str | None, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Train many students over one cache and compare them in one table. Run the command again to continue."""
    from pipelines.ablate import run as pipeline

    request = pipeline.AblateRequest(Path(grid), Path(out or Path("ablations") / Path(grid).stem), **asked)
    if dry_run:
        listed, text = pipeline.dry_run(request)
        say(json.dumps(listed) if as_json else text)
        return
    result = pipeline.ablate(request, console())
    text = result.pop("markdown")
    say(json.dumps(result) if as_json else text)
    for one in result["failed"]:
        say(f"failed: {one['name']}: {one['error']} (log: {one['log']})", err=True)
    if result["failed"]:
        sys.exit(1)
