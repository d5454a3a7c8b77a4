"""``kdcli --help`` as a tour: sections in the order of work, an example below every command. One that is in no table shows up too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from pipelines.command_line.completion import completing

SECTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "": {
        "Start": {
            "demo": "run everything on a small rendered world, in minutes",
            "init": "write a commented kd.toml: teacher, student, data, cache",
            "methods": "list methods, their needs, fields and loss terms",
            "completion": "print a shell completion script",
        },
        "Before the job": {
            "doctor": "list defects of a mixture; with --cache, wrong answers",
            "plan": "estimate tokens, bytes, shards and hours",
            "preflight": "go or no-go: compare cache and teacher on a few rows",
        },
        "Capture": {
            "cache-teacher": "run the teacher once and write the cache",
            "cache": "inspect, repair and edit a cache",
        },
        "Train": {
            "train-student": "train a student from the cache, without the teacher",
            "ablate": "train many students over one cache, compare them",
        },
        "Evaluate": {
            "eval": "score a model on held-out questions",
            "eval-tasks": "print the folder of task groups for lmms-eval",
            "fidelity": "compare cached losses and gradients with the teacher",
            "report": "write one HTML page about runs and their cache",
        },
        "Export": {"export": "write a folder for plain transformers"},
    },
    "cache": {
        "Inspect": {
            "status": "show shards, rows, skips, bytes; workers and time left",
            "inspect": "show one sample as words",
            "verify": "check every checksum; exit status 1 on damage",
            "urls": "print the tar paths of a column, for webdataset",
        },
        "Repair": {
            "repair": "make damaged files again, and nothing else",
            "gc": "list or remove files that no commit names",
        },
        "Edit": {
            "add-field": "capture more fields from the cache's own samples",
            "drop-field": "remove one field; without --yes, only list it",
            "subset": "write a new cache with some rows, parts or fields",
            "merge": "join the rows of several caches in a new one",
        },
    },
}
"""Group → section → command → what it is for, in the order in which one comes to need them."""
OTHERS = "Others"

EXAMPLES: Mapping[str, str] = {
    "demo": "kdcli demo --out demo-run",
    "init": "kdcli init",
    "methods": "kdcli methods",
    "completion": "kdcli completion bash > ~/.kdcli-complete.sh",
    "doctor": "kdcli doctor train.json --image-root images --teacher MODEL --show 2",
    "plan": "kdcli plan --rows caption=558128 --rows sft=665298 --gpus 16",
    "preflight": "kdcli preflight --methods llava-kd,kd --rows 256",
    "cache-teacher": "kdcli cache-teacher --teacher MODEL --data train.json --image-root images --out cache --shards 8",
    "cache status": "kdcli cache status cache",
    "cache inspect": "kdcli cache inspect cache --row 3",
    "cache verify": "kdcli cache verify cache",
    "cache urls": "kdcli cache urls cache response_topk",
    "cache repair": "kdcli cache repair cache --teacher MODEL --dry-run",
    "cache gc": "kdcli cache gc cache --yes",
    "cache add-field": "kdcli cache add-field cache --field affinity --set layout=dense",
    "cache drop-field": "kdcli cache drop-field cache response_topk --yes",
    "cache subset": "kdcli cache subset cache --parts sft --fraction 0.1 --out tenth",
    "cache merge": "kdcli cache merge captions tenth --out small",
    "train-student": "kdcli train-student --method llava-kd --student MODEL --cache cache --output-dir runs/llava-kd",
    "ablate": "kdcli ablate grid.toml --dry-run",
    "eval": "kdcli eval runs/llava-kd --data heldout.json --image-root images",
    "eval-tasks": "kdcli eval-tasks",
    "fidelity": "kdcli fidelity --cache cache --teacher MODEL --student MODEL --samples 64",
    "report": "kdcli report runs --cache cache --out report.html",
    "export": "kdcli export runs/llava-kd --out exported --check",
}
"""Command, with its group → a line that can be typed."""


CONTINUED: Mapping[str, tuple[str, ...]] = {
    "demo": (),
    "preflight": (),
    "cache-teacher": (),
    "cache repair": (),
    "cache add-field": (),
    "cache subset": (),
    "cache merge": (),
    "train-student": (),
    "ablate": (),
    "eval": ("out", "answers"),
}
"""Commands that go on where they stopped, where one of these options is given if any are named."""

HELP: Mapping[str, str] = {
    "seed": "Seed of every random number.",
    "image_root": "Folder that relative image paths start from.",
    "limit": "Use only the first N questions.",
    "batch_size": "Questions per batch.",
    "learning_rate": "Peak learning rate; default: the stage's own (PT, DPT 1e-3; SFT, DFT 2e-5).",
    "per_device_train_batch_size": "Samples per micro-batch and process (default 8).",
    "gradient_accumulation_steps": "Micro-batches per optimizer step (default 1).",
    "num_train_epochs": "Epochs per stage (default 1).",
    "warmup_ratio": "Warm-up share of the steps (default 0.03).",
    "gradient_checkpointing": "Recompute activations: less memory, more time.",
    "dataloader_num_workers": "Loader processes (default 0: load in the main process).",
    "save_steps": "Steps between checkpoints (default 500).",
    "out": "File or folder to write.",
}
"""Options that every trainer has, explained where their command says nothing of them."""


def place(context: click.Context) -> str:
    """``cache add-field``: a command's name with its groups, without the program's."""
    names = []
    here: click.Context | None = context
    while here and here.parent:
        names.append(str(here.info_name))
        here = here.parent
    return " ".join(reversed(names))


def continues(context: click.Context) -> bool:
    """Whether the same command line goes on where this one stops."""
    options = CONTINUED.get(place(context))
    return options is not None and (not options or any(context.params.get(one) for one in options))


class TourCommand(click.Command):
    """A command whose help ends with an example, whose plain names complete, and which says so where the same line goes on with it."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        completing(self.params)
        for one in self.params:
            if isinstance(one, click.Option) and not one.help:
                one.help = HELP.get(str(one.name))

    def invoke(self, context: click.Context) -> Any:
        """Ctrl-C, and a signal that said nothing of the work, are told with how to continue."""
        from teacher_cache.stopping import CONTINUE, Stopped

        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            if not continues(context):
                raise
            raise click.ClickException(f"interrupted: {CONTINUE}") from None
        except Stopped as stop:
            if stop.what or not continues(context):
                raise
            raise Stopped(stop.number, CONTINUE) from None

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(context, formatter)
        if example := EXAMPLES.get(place(context)):
            formatter.write_paragraph()
            formatter.write(f"Example:\n  {example}\n")


def command(name: str | None = None) -> Callable[[Callable[..., Any]], TourCommand]:
    """A command that is not yet in a group, of a function; its name is the function's where none is given."""
    return click.command(name, cls=TourCommand)


class TourGroup(click.Group):
    """Lists its commands in the sections of ``SECTIONS``; those in none of them come last."""

    command_class = TourCommand
    group_class = type  # of the same kind

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for names in self.sections(context).values() for name in names]

    def sections(self, context: click.Context) -> dict[str, list[str]]:
        table = SECTIONS.get(place(context), {})
        found = {title: [name for name in lines if name in self.commands] for title, lines in table.items()}
        placed = {name for names in found.values() for name in names}
        found[OTHERS if found else "Commands"] = [name for name in self.commands if name not in placed]
        return {title: names for title, names in found.items() if names}

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        table = {name: line for lines in SECTIONS.get(place(context), {}).values() for name, line in lines.items()}
        widest = max(map(len, self.commands), default=0)
        limit = formatter.width - 6 - widest
        for title, names in self.sections(context).items():
            told = [(one.ljust(widest), table.get(one) or self._own_words(one, limit)) for one in names]
            with formatter.section(title):
                formatter.write_dl(told)

    def _own_words(self, name: str, limit: int) -> str:
        return self.commands[name].get_short_help_str(limit)
