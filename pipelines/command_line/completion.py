"""Shell completion of names: methods, fields, compressors, stages. It reads the files that have them, and imports nothing of torch."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
ROOT = Path(__file__).parents[2]


def script(program: click.Command, shell: str) -> str:
    """What a shell reads so that it completes ``kdcli``."""
    found = get_completion_class(shell)
    assert found, f"click has {SHELLS}"
    return found(program, {}, "kdcli", "_KDCLI_COMPLETE").source()


def constants(place: str, name: str) -> list[Any]:
    """The literal values of ``name`` at the top of a file, or of every file of a folder that has it."""
    path = ROOT / place
    found = []
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and name in [one.id for one in node.targets if isinstance(one, ast.Name)]:
                found.append(ast.literal_eval(node.value))
    return found


def named(folder: str) -> list[str]:
    """The ``NAME`` of every module of a registry folder."""
    return constants(folder, "NAME")


def fields() -> list[str]:
    return [name for names in constants("teacher_cache/fields", "FIELDS") for name in names]


def stores() -> list[str]:
    from pipelines.capture.profiles import PROFILES

    return list(PROFILES)


def stages() -> list[str]:
    from student_train.stages import STAGES

    return list(STAGES)


VALUES: Mapping[str, Callable[[], Iterable[str]]] = {
    "method": partial(named, "student_train/methods"),
    "methods": partial(named, "student_train/methods"),
    "compressor": lambda: [*named("student_train/compressors"), "none"],
    "compress": partial(named, "student_train/pruning"),
    "store": stores,
    "fields": fields,
    "names": fields,  # cache add-field --field
    "name": fields,  # cache drop-field CACHE NAME
    "column": lambda: ["samples", *fields()],
    "stages": stages,
    "stage": stages,
    "preset": lambda: ("default", "paper", "code"),
    "codec": lambda: ("sketch", "bf16", "int8", "int4", "fp32"),
    "dtype": lambda: ("auto", "float32", "bfloat16", "float16"),
    "device": lambda: ("cpu", "cuda"),
    "executor": lambda: ("local", "ray", "slurm"),
    "report_to": lambda: ("tensorboard", "wandb", "trackio", "none"),
    "template": lambda: ("chat", "plain", "v1", "qwen_1_5"),
}
"""Name of an option or argument → the words that it takes."""
FILES = frozenset(
    [
        "url",
        "urls",
        "cache_url",
        "out",
        "output_dir",
        "data",
        "image_root",
        "paths",
        "model",
        "source",
        "runs",
        "grid",
        "config",
        "teacher",
        "student",
        "like",
        "calibration",
        "keys",
        "plot",
        "local_cache",
    ]
)
"""What is often a path."""
LISTS = ("methods", "fields", "stages", "report_to")
"""Comma-separated: the last name is completed."""


class Words(click.types.StringParamType):
    """Text whose usual words a shell may offer; any other is taken too."""

    def __init__(self, words: Callable[[], Iterable[str]], many: bool):
        self.words, self.many = words, many

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if self.many else ("", "", incomplete)
        return [CompletionItem(f"{before}{comma}{word}") for word in self.words() if word.startswith(last)]


class Files(click.types.StringParamType):
    """Text that often is a path; a hub id or a URL is taken too."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def completing(params: Iterable[click.Parameter]) -> None:
    """Give plain text parameters of a command their words."""
    for one in params:
        if type(one.type) is not click.types.StringParamType:
            continue
        if one.name in VALUES:
            one.type = Words(VALUES[one.name], one.name in LISTS)
        elif one.name in FILES:
            one.type = Files()
