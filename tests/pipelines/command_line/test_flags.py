"""Defaults < kd.toml < flags, command by command: what the file says is used, and a flag says otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main

FILE = """
cache = "of-the-file"
[teacher]
id = "file/teacher"
[[data]]
part = "caption"
path = "{captions}"
image_root = "{images}"
template = "plain"
[train]
student = "file/student"
"""
CACHE = ("of-the-file: no cache here", "of-a-flag: no cache here")
TEACHER = ("'file/teacher' cannot be loaded", "'flag/teacher' cannot be loaded")

COMMANDS = [
    # command, its flags, what is refused (of the file, of the flag)
    (["plan"], ["--teacher", "flag/teacher"], TEACHER),
    (["preflight", "--no-write"], ["--teacher", "flag/teacher"], TEACHER),
    (["cache-teacher", "--out", "new", "--shards", "1"], ["--teacher", "flag/teacher"], TEACHER),
    (["train-student"], ["--cache", "of-a-flag"], CACHE),
    (["fidelity"], ["--cache", "of-a-flag"], CACHE),
    (["report", "runs"], ["--cache", "of-a-flag"], CACHE),
    (["cache", "status"], ["of-a-flag"], CACHE),
    (["cache", "inspect"], ["of-a-flag"], CACHE),
    (["cache", "verify"], ["of-a-flag"], CACHE),
    (["cache", "gc"], ["of-a-flag"], CACHE),
    (["cache", "add-field", "--field", "affinity"], ["of-a-flag"], CACHE),
    (["doctor"], ["of-a-flag.json"], (TEACHER[0], "of-a-flag.json")),
]


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    (line,) = (one for one in result.stderr.splitlines() if one.startswith("Error: "))
    return line


@pytest.fixture
def folder(tmp_path: Path, world, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = FILE.format(captions=world.captions, images=world.images)
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "flags", "said"), COMMANDS, ids=[" ".join(one[0][:2]) for one in COMMANDS])
def test_a_flag_wins_over_the_file(folder: Path, command: list[str], flags: list[str], said: tuple[str, str]) -> None:
    of_file, of_flag = said
    assert re.search(of_file, refusal(*command, "--config", "run.toml"))
    assert re.search(of_flag, refusal(*command, *flags, "--config", "run.toml"))
    (folder / "run.toml").rename(folder / "kd.toml")  # where it is read without being named
    assert re.search(of_file, refusal(*command))


def test_every_command_that_the_file_has_values_for_reads_it() -> None:
    """The others take a cache that they write or remove by its name alone, a grid file, or a model."""
    named = {"demo", "init", "methods", "completion", "ablate", "eval"}
    named |= {f"cache {name}" for name in ("drop-field", "subset", "merge", "urls")}
    groups = {"": main.commands, "cache ": main.commands["cache"].commands}
    without = {
        f"{before}{name}"
        for before, commands in groups.items()
        for name, command in commands.items()
        if name != "cache" and "config" not in [one.name for one in command.params]
    }
    assert named & without == named and without - named <= {"export", "eval-tasks"}


@pytest.mark.parametrize(
    ("given", "said"), [("tensorboard,mlflow", "got mlflow"), ("none,wandb", "none must be the only one")]
)
def test_trackers_by_flag(folder: Path, given: str, said: str) -> None:
    assert re.search(said, refusal("train-student", "--report-to", given, "--config", "run.toml"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--schedule", "vis"), "--schedule vis: write TERM=TEXT"),
        (("--log-term-gradients", "-1"), "must be at least 0"),
    ],
)
def test_flags_of_terms(folder: Path, given: tuple[str, ...], said: str) -> None:
    assert re.search(said, refusal("train-student", *given, "--config", "run.toml"))
