"""``--help`` as a tour: every command in a section, one line each; every command's help has an example that its options take."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator
from pkgutil import iter_modules

import click
import pytest
from click.testing import CliRunner

from cli import CommandGroup, main
from pipelines import command_line
from pipelines.command_line.tour import CONTINUED, EXAMPLES, OTHERS, SECTIONS
from teacher_cache.stopping import Stopped

WIDE = 120


def walk(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from walk(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


COMMANDS = dict(walk(main))


def test_no_command_of_a_module_is_forgotten() -> None:
    modules = [
        importlib.import_module(f"{command_line.__name__}.{one.name}") for one in iter_modules(command_line.__path__)
    ]
    made = {one for module in modules for one in vars(module).values() if isinstance(one, click.Command)}
    assert made == {*COMMANDS.values(), main.commands["cache"]}


def help_of(*words: str, width: int = WIDE) -> str:
    result = CliRunner().invoke(main, [*words, "--help"], terminal_width=width)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("group", ["", "cache"])
def test_commands_stand_in_sections_in_the_order_of_work(group: str) -> None:
    text = help_of(*group.split(), width=80)
    there = main.commands[group].commands if group else main.commands
    tour = text.split("--help")[-1]
    listed = [line.split()[0] for line in tour.splitlines()[1:] if line.startswith("  ")]
    titled = [title for title in SECTIONS[group] if f"\n{title}:\n" in text]
    assert sorted(listed) == sorted(there), "each once"
    assert [one for title in titled for one in SECTIONS[group][title] if one in there] == listed
    assert OTHERS not in text and "..." not in tour, "a tour breaks off nowhere"


def test_a_command_that_no_section_knows_is_listed_last() -> None:
    group = CommandGroup("new", commands={"unheard-of": click.Command("unheard-of", help="Something new.")})
    for name in ("init", "demo"):
        group.add_command(main.commands[name])
    lines = [line.strip() for line in CliRunner().invoke(group, ["--help"]).output.splitlines()]
    assert lines[-2:] == [f"{OTHERS}:", "unheard-of  Something new."]
    assert lines.index("Start:") < lines.index(f"{OTHERS}:")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_can_be_typed(name: str) -> None:
    example = EXAMPLES[name]
    assert help_of(*name.split()).endswith(f"Example:\n  {example}\n")
    words = shlex.split(example.split(" > ")[0])
    assert words[: 1 + len(name.split())] == ["kdcli", *name.split()]
    command = COMMANDS[name]
    with command.make_context(name, words[1 + len(name.split()) :]) as context:  # a UsageError where it does not parse
        assert not context.args


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_explained_in_one_line(name: str) -> None:
    context = click.Context(COMMANDS[name], terminal_width=WIDE)
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            record = option.get_help_record(context)
            assert option.help and record, f"{name} {option.opts}: no help"
            assert len(record[1]) <= WIDE - 36, (
                f"{name} {option.opts}: {len(record[1])} characters are more than a line"
            )


@pytest.mark.parametrize(
    "words", ["preflight", "cache subset CACHE --out NEW", "eval RUN --data D --out OUT", "eval RUN --data D", "doctor"]
)
def test_who_is_interrupted_is_told_how_to_continue_where_that_is_true(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(**asked: object) -> None:
        raise signals.pop()

    name = " ".join(words.split()[: 2 if words.startswith("cache") else 1])
    monkeypatch.setattr(COMMANDS[name], "callback", stop)
    signals: list[BaseException] = [Stopped(15, "all stays"), Stopped(15), KeyboardInterrupt()]
    interrupted, stopped, worded = [CliRunner().invoke(main, words.split()) for _ in range(3)]
    again = "run the same command again to continue"
    goes_on = words not in ("eval RUN --data D", "doctor")
    assert interrupted.exit_code == 1
    assert interrupted.output.strip() == (f"Error: interrupted: {again}" if goes_on else "Aborted!")
    assert stopped.output.strip() == f"stopped by SIGTERM{f': {again}' if goes_on else ''}"
    assert worded.output.strip() == "stopped by SIGTERM: all stays" and worded.exit_code == stopped.exit_code == 143


def test_what_continues_is_a_command_with_these_options() -> None:
    for name, options in CONTINUED.items():
        assert set(options) <= {one.name for one in COMMANDS[name].params}, name
