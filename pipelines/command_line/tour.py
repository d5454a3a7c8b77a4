"""``kdcli --help`` as a tour: sections in the order of work, an example below every command. One that is in no table shows up too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from pipelines.command_line.completion import completing

SECTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "": {
        "Start": {
            "demo": "the whole loop on a small rendered world, in minutes",
            "init": "write a commented kd.toml: teacher, student, data, cache",
            "methods": "what each method needs, and which fields serve it",
            "completion": "commands, flags and names on the Tab key",
        },
        "Before the job": {
            "doctor": "defects of the mixture, by kind, with file and row",
            "plan": "tokens, bytes, shards and hours, from a few rows",
            "preflight": "go or no-go: a few hundred rows, cache against teacher",
        },
        "Capture": {
            "cache-teacher": "the batch job: run the teacher once, write the cache",
            "cache": "look at a cache, mend it, change it",
        },
        "Train": {
            "train-student": "train from the cache, no teacher in memory",
            "ablate": "many students over one cache, in one table",
        },
        "Judge": {
            "eval": "held-out questions: scores by family, and nll",
            "eval-tasks": "the folder of task groups for lmms-eval",
            "fidelity": "cached losses and gradients against the live teacher",
            "report": "one HTML page: results, curves, sizes, words of patches",
        },
        "Ship": {"export": "a folder that plain transformers loads"},
    },
    "cache": {
        "Look": {
            "status": "shards, rows, skips, bytes; who runs, how long still",
            "inspect": "one sample as words",
            "verify": "every checksum; exit status 1 where one fails",
            "urls": "the tar paths of a column, for the webdataset library",
        },
        "Mend": {
            "repair": "make what is damaged again, and nothing else",
            "gc": "list or remove files that no commit names",
        },
        "Change": {
            "add-field": "capture further fields from the cache's own samples",
            "drop-field": "remove one field, or say what would go",
            "subset": "a new cache of some rows, parts or fields",
            "merge": "a new cache of the rows of several",
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


HELP: Mapping[str, str] = {
    "seed": "Of every random draw.",
    "image_root": "Folder of relative image paths.",
    "limit": "Use only the first N questions.",
    "batch_size": "Questions answered at a time.",
    "learning_rate": "Peak; default: the stage's own (PT, DPT 1e-3; SFT, DFT 2e-5).",
    "per_device_train_batch_size": "Samples of a micro-batch (default 8).",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step (default 1).",
    "num_train_epochs": "Epochs of every stage (default 1).",
    "warmup_ratio": "Share of the steps in which the rate rises (default 0.03).",
    "gradient_checkpointing": "Less memory for more time.",
    "dataloader_num_workers": "Loader processes (default 0: none).",
    "save_steps": "Steps between two checkpoints (default 500).",
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


class TourCommand(click.Command):
    """A command whose help ends with an example, and whose plain names complete."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        completing(self.params)
        for one in self.params:
            if isinstance(one, click.Option) and not one.help:
                one.help = HELP.get(str(one.name))

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
