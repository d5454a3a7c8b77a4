"""``docs/kd_toml.md`` lists every key, as it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from pipelines.command_line.capture import cache_teacher
from pipelines.command_line.training import train_student
from pipelines.settings import CaptureSettings, load_settings
from student_train.config import StageSettings, TrainSettings
from student_train.methods import method_modules
from teacher_cache.errors import KdcliError
from teacher_cache.fields import field_kinds
from teacher_cache.sources import DataSpec
from teacher_cache.teachers.transformers import TeacherSpec
from tests.pipelines.command_line.settings_page import PAGE, page, sentences

SECTIONS = {
    "[teacher]": TeacherSpec,
    "[[data]]": DataSpec,
    "[capture]": CaptureSettings,
    "[train]": TrainSettings,
    "[stages.NAME]": StageSettings,
}


def lines_of(title: str) -> Iterator[list[str]]:
    """Cells of the lines of a section's table, without head and rule."""
    section = PAGE.read_text().split(f"\n## `{title}`\n")[1].split("\n## ")[0]
    for line in [one for one in section.splitlines() if one.startswith("|")][2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text() == page(), "write it again: python -m tests.pipelines.command_line.settings_page"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_stands_there_once_with_a_sentence(title: str) -> None:
    lines = list(lines_of(title))
    assert [line[0].strip("`") for line in lines] == [one.name for one in fields(SECTIONS[title])]
    assert all(len(line) == 5 and line[4].endswith((".", ").")) for line in lines)


def test_every_default_of_the_page_can_be_written_into_the_file(tmp_path: Path) -> None:
    """And is the default: a file of nothing else gives the settings of an empty one."""
    text = []
    for title in SECTIONS:
        text.append(title.replace("NAME", "DFT"))
        given = {"id": '"x"', "part": '"sft"', "path": '"a.json"'}
        for key, _, default, *_ in lines_of(title):
            name, value = key.strip("`"), default.strip("`")
            if default.startswith("`") or value == "must be given":
                text.append(f"{name} = {given.get(name, value)}")
    bare = '[teacher]\nid = "x"\n[[data]]\npart = "sft"\npath = "a.json"\n[stages.DFT]\n'
    (tmp_path / "kd.toml").write_text("\n".join(text))
    (tmp_path / "bare.toml").write_text(bare)
    assert load_settings(tmp_path / "kd.toml") == load_settings(tmp_path / "bare.toml")
    assert len(tomllib.loads("\n".join(text))["train"]) > 20


def test_fields_and_methods_are_all_there() -> None:
    named = {name for line in lines_of("[fields.NAME]") for name in re.findall(r"`(\w+)`", line[0])}
    assert named == set(field_kinds())
    assert [line[0].strip("`") for line in lines_of("[methods.NAME]")] == list(method_modules())


def test_flags_of_the_page_are_flags_and_none_is_left_out() -> None:
    """Every flag of the two commands that sets a key stands beside it; a flag of the page is one of theirs."""
    for command, titles in ((cache_teacher, ("[teacher]", "[[data]]", "[capture]")), (train_student, ("[train]",))):
        known = {option for one in command.params for option in one.opts}
        told = {line[0].strip("`"): line[3] for title in titles for line in lines_of(title)}
        assert {flag.strip("`") for flag in told.values()} - {"–"} <= known
        assert all(told[str(one.name)] != "–" for one in command.params if one.name in told)


def test_a_key_without_a_sentence_is_named() -> None:
    @dataclass(frozen=True)
    class Undocumented:
        """Attributes:
        first: is told,
            over two lines.
        """

        first: int = 0
        second: int = 0

    with pytest.raises(KdcliError, match="Undocumented: say under Attributes what second is, a line a key"):
        sentences(Undocumented)
