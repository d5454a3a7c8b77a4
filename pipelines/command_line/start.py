"""First steps: the demo, a kd.toml, the table of methods, the Tab key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from pipelines.command_line.options import A_FOLDER, json_option
from pipelines.command_line.output import console, say
from pipelines.command_line.tour import command


@command()
@click.option(
    "--out",
    type=A_FOLDER,
    default="demo-run",
    show_default=True,
    help="Output folder of world, cache, students and report.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of the order of rows in training; the world stays the same."
)
@click.option(
    "--wrong-answers",
    type=click.FloatRange(0, 1),
    default=0.4,
    show_default=True,
    help="Share of wrong training answers; 0: clean answers.",
)
def demo(out: str, seed: int, wrong_answers: float) -> None:
    """Run everything on a small rendered world: data → cache → students → table and HTML report."""
    from pipelines.demo.run import DEMO, run_demo

    run_demo(Path(out), seed, console(), replace(DEMO, wrong_answers=wrong_answers))


@command()
def init() -> None:
    """Write a commented kd.toml into the current folder."""
    from pipelines.settings import write_template

    target = write_template(Path("."))
    say(
        f"wrote {target}: edit teacher, student and data in it; then `kdcli doctor`, `kdcli plan`, `kdcli preflight`, `kdcli cache-teacher`"
    )


@command()
@json_option
def methods(as_json: bool) -> None:
    """List the methods with their needs, the fields that serve them, papers and loss terms; and methods not offered, with the reason."""
    from pipelines.train import method_table

    say(json.dumps(method_table.as_json()) if as_json else method_table.text())


@command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands, flags, methods and fields in a shell.

    \b
    bash:  kdcli completion bash > ~/.kdcli-complete.sh, then `source ~/.kdcli-complete.sh` in ~/.bashrc
    zsh:   kdcli completion zsh > ~/.kdcli-complete.zsh, then `source ~/.kdcli-complete.zsh` in ~/.zshrc
    fish:  kdcli completion fish > ~/.config/fish/completions/kdcli.fish
    """
    from pipelines.command_line.completion import script

    say(script(click.get_current_context().find_root().command, shell))
