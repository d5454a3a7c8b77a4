"""Imports point one way: kdcli → cli → pipelines → {student_train, teacher_cache}; student_train → teacher_cache; never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ("kdcli", "cli", "pipelines", "student_train", "teacher_cache")
MAY_IMPORT = {
    "kdcli": {"kdcli", "cli", "pipelines", "student_train", "teacher_cache"},
    "cli": {"cli", "pipelines", "student_train", "teacher_cache"},
    "pipelines": {"pipelines", "student_train", "teacher_cache"},
    "student_train": {"student_train", "teacher_cache"},
    "teacher_cache": {"teacher_cache"},
}
NOT_FOR_STUDENTS = (
    "teacher_cache.capturing",
    "teacher_cache.shards.writer",
    "teacher_cache.teachers.transformers",
)
"""What makes a cache: a student only reads one (the head product is shared)."""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def files(house: str) -> list[Path]:
    return [ROOT / "cli.py"] if house == "cli" else sorted((ROOT / house).rglob("*.py"))


@pytest.mark.parametrize("house", HOUSES)
def test_imports_point_one_way(house: str) -> None:
    assert files(house)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(house)
        for line, name in imported(path)
        if name.split(".")[0] in HOUSES and name.split(".")[0] not in MAY_IMPORT[house]
    ]
    assert not wrong, "\n".join(wrong)


ROOMS = (
    "sources",
    "planning",
    "families",
    "preparing",
    "models",
    "teachers",
    "fields",
    "codecs",
    "shards",
    "reading",
    "capturing",
)


def test_rooms_of_teacher_cache_have_no_circles() -> None:
    """What a folder imports is below it: no two import each other, directly or by way of a third."""
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    assert sorted(ROOMS) == sorted(path.parent.name for path in (ROOT / "teacher_cache").glob("*/__init__.py"))
    for room in ROOMS:
        for path in (ROOT / "teacher_cache" / room).rglob("*.py"):
            below[room] |= {part for _, name in imported(path) if (part := [*name.split("."), ""][1]) in ROOMS}
        below[room].discard(room)
    while clear := [room for room, needs in below.items() if not needs & set(below)]:
        for room in clear:
            del below[room]
    assert not below, f"these import each other: {below}"


def test_students_import_what_reads_a_cache_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("student_train")
        for line, name in imported(path)
        if name.startswith(NOT_FOR_STUDENTS)
    ]
    assert not wrong, "\n".join(wrong)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from cli import main; "
        "result = CliRunner().invoke(main, ['--help']); assert result.exit_code == 0, result.output; "
        "print(sorted({'torch', 'transformers', 'pyarrow', 'webdataset', 'numpy', 'PIL', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_two_classes_are_named_alike() -> None:
    """A name says one thing in the whole product. Each field keeps its parameters in a class ``Params`` of its own file."""
    places: dict[str, list[str]] = {}
    for house in HOUSES:
        for path in files(house):
            for node in ast.parse(path.read_text(), str(path)).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    places.pop("Params")
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for house in HOUSES
        for path in files(house)
        if (lines := len(path.read_text().splitlines())) > 300
    }
    assert not long, "split by role (docs/style.md)"
