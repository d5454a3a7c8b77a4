"""``docs/kd_toml.md``: every key of kd.toml with its type, default and flag, and the sentence that its dataclass has of it.

``python -m tests.pipelines.command_line.settings_page`` writes it again, in the project's own tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from textwrap import dedent
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import click

from pipelines.command_line.capture import cache_teacher
from pipelines.command_line.training import train_student
from pipelines.settings import CaptureSettings, Settings
from student_train.config import StageSettings, TrainSettings
from student_train.methods import DEFAULT, method_modules, presets_of
from teacher_cache.errors import KdcliError
from teacher_cache.fields import create_field, field_kinds
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec

PAGE = Path(__file__).parents[3] / "docs" / "kd_toml.md"
FLAGS = {"id": "--teacher", "path": "--data"}
"""Keys whose flag has another name."""
OTHER_KINDS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "affinity": ({"layout": "factored"},),
    "hidden": ({"codec": "sketch"},),
    "sampled": ({"sampler": "random"},),
}
"""Parameters that bring others with them, by the end of a field's name."""
INTERNAL = ("codec_version", "coding", "value_dtype")
NO_FLAG = "–"
SENTENCES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
}

HEAD = """# Every key of kd.toml

`kdcli init` writes a commented kd.toml with the keys that most jobs need; this page lists all keys. A missing key has its default. Flags
override kd.toml. An unknown key is an error that lists the known ones. Relative paths start at the current folder.

Flags are those of `kdcli cache-teacher` and, for `[train]`, of `kdcli train-student`; other commands have some of them. `–` means not set
(as a default) or no flag (set the key in the file).
"""
FIELDS = """Parameters of a field. They override those of the profile (`store`); with `fields = […]` there is no profile, and these are the
defaults. [Fidelity](fidelity.md) and [FORMAT.md](../teacher_cache/shards/FORMAT.md) explain them. `--k` and `--codec` set them for all
fields that have them.
"""
FOOT = """This page is generated from the docstrings of the settings classes:
`python -m tests.pipelines.command_line.settings_page` writes it again.
"""


def page() -> str:
    teacher, train = (options_of(command) for command in (cache_teacher, train_student))
    sections = [
        (
            "`cache`",
            "Stands above all tables.",
            rows(Settings, {"cache": "--cache, --out"}, ("cache",)),
        ),
        ("`[teacher]`", "", rows(TeacherSpec, teacher)),
        ("`[[data]]`", "One block for each part of the mixture.", rows(DataSpec, teacher)),
        ("`[capture]`", "", rows(CaptureSettings, teacher)),
        ("`[train]`", "", rows(TrainSettings, train)),
        (
            "`[stages.NAME]`",
            "Overrides `[train]` in stage `PT`, `DPT`, `SFT` or `DFT`.",
            rows(StageSettings, {}),
        ),
    ]
    pieces = [HEAD]
    for title, words, body in sections:
        table = ["| key | type | default | flag | meaning |", "|---|---|---|---|---|", *body]
        pieces.append("\n\n".join(one for one in (f"## {title}", words, "\n".join(table)) if one) + "\n")
    return "\n".join([*pieces, fields_section(), methods_section(), FOOT])


def options_of(command: click.Command) -> dict[str, str]:
    """Key → flag."""
    return {str(one.name): one.opts[-1] for one in command.params if isinstance(one, click.Option)}


def rows(cls: type, flags: Mapping[str, str], only: tuple[str, ...] = ()) -> Iterator[str]:
    """A line a key, in the order of the class."""
    words, types = sentences(cls), get_type_hints(cls)
    for one in fields(cls):
        if only and one.name not in only:
            continue
        flag = FLAGS.get(one.name, flags.get(one.name, ""))
        cells = [
            f"`{one.name}`",
            kind(types[one.name]),
            default(one),
            code(flag) if flag in flags.values() else NO_FLAG,
        ]
        yield f"| {' | '.join(cells)} | {words[one.name]} |"


def sentences(cls: type) -> dict[str, str]:
    """Key → what stands behind it under ``Attributes`` of the docstring; KdcliError naming a key that has nothing there."""
    _, _, text = dedent(f"    {cls.__doc__}").partition("Attributes:\n")
    found = {
        name: re.sub(r"\s+", " ", words).strip().replace("``", "`")
        for name, words in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", text, re.MULTILINE)
    }
    lacking = [one.name for one in fields(cls) if one.name not in found]
    if lacking:
        raise KdcliError(f"{cls.__name__}: say under Attributes what {', '.join(lacking)} is, a line a key")
    return {name: words[0].upper() + words[1:] for name, words in found.items()}


def kind(wanted: Any) -> str:
    """A type in the words of TOML."""
    if isinstance(wanted, UnionType):
        return " or ".join(kind(one) for one in get_args(wanted) if one is not type(None))
    if get_origin(wanted) is tuple:
        return f"list of {kind(get_args(wanted)[0])}s"
    if get_origin(wanted) is Mapping:
        return "table"
    return SENTENCES.get(getattr(wanted, "__name__", ""), str(wanted))


def default(one: Field[Any]) -> str:
    if one.default is MISSING:
        return "must be given"
    return NO_FLAG if one.default is None else code(toml(one.default))


def toml(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def code(text: str) -> str:
    return ", ".join(f"`{one}`" for one in text.split(", "))


def fields_section() -> str:
    """Parameters of every field as it is made without any, and of the kinds of it that have others."""
    body: dict[str, list[str]] = {}
    for name in sorted(field_kinds()):
        others = next((kinds for end, kinds in OTHER_KINDS.items() if name.endswith(end)), ())
        for given in ({}, *others):
            params = {key: value for key, value in create_field(name, given).params.items() if key not in INTERNAL}
            line = ", ".join(f"`{key} = {toml(value)}`" for key, value in params.items()) or "none"
            body.setdefault(line, []).append(f"`{name}`")
    lines = [f"| {', '.join(names)} | {line} |" for line, names in body.items()]
    return "\n".join(
        [
            "## `[fields.NAME]`\n",
            FIELDS,
            "| field | keys, with their defaults |",
            "|---|---|",
            *lines,
            "",
        ]
    )


def methods_section() -> str:
    """Knobs of every method, of its default preset."""
    lines = []
    for name in method_modules():
        preset = presets_of(name)[DEFAULT]
        knobs = [f"`{one.name} = {toml(getattr(preset, one.name))}`" for one in fields(preset)]
        lines.append(f"| `{name}` | {', '.join(knobs) or 'none'} |")
    return "\n".join(
        [
            "## `[methods.NAME]`\n",
            "Knobs of a method; they override the preset. The flag is `--set NAME=VALUE`. [Methods](methods.md) explains each knob.\n",
            "| method | keys, with the defaults |",
            "|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
