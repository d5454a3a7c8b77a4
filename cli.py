"""kdcli: run the teacher once, train every student from disk. The commands are in ``pipelines/command_line``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import pipelines.processes.quiet_threads  # noqa: F401 (before any command imports torch)
from pipelines.command_line import capture, judging, output, planning, preflight, start, training
from pipelines.command_line.cache import cache_group
from pipelines.command_line.tour import TourGroup


class CommandGroup(TourGroup):
    """Prints the project's own errors as one line, and the signal that ended a command."""

    def main(self, *arguments: Any, **named: Any) -> Any:
        output.hold_streams()
        try:
            return super().main(*arguments, **named)
        except OSError as error:  # --help on a full disk, or an error that stderr does not take
            output.give_up_stdout()
            output.say(f"Error: a file or standard output: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        from teacher_cache import parent, stopping  # noqa: F401 (parent: who it is, while it is there)
        from teacher_cache.errors import KdcliError, advice, is_of_disk, one_line, out_of_memory

        try:
            with stopping.listening():
                return super().invoke(ctx)
        except stopping.Stopped as stop:
            if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
                click.echo(one_line(stop), err=True)
            raise
        except KdcliError as error:
            raise click.ClickException(one_line(error)) from None
        except OSError as error:
            told = f": {advice(error)}" if is_of_disk(error) else ""
            if not error.strerror or (error.filename is None and not told):
                raise
            place = "a file or standard output" if error.filename is None else error.filename
            raise click.ClickException(one_line(f"{place}: {error.strerror}{told}")) from None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise click.ClickException(
                f"out of memory ({one_line(error)[:200] or 'MemoryError'}): use smaller batches, fewer processes, or a machine with "
                "more memory; written files are kept"
            ) from None


COMMANDS = (
    *(start.demo, start.init, start.methods, start.completion),
    *(planning.doctor, planning.plan, preflight.preflight),
    *(capture.cache_teacher, cache_group),
    *(training.train_student, training.ablate),
    *(judging.evaluate, judging.evaluation_tasks, judging.fidelity, judging.report, judging.export_model),
)


@click.group(
    cls=CommandGroup,
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="kdcli")
def main() -> None:
    """Distil multimodal language models: run the teacher once, cache its signals on disk, train any number of students from them.

    \b
    `kdcli COMMAND -h` shows a command's options and an example.
    Settings come from kd.toml (`kdcli init` writes one); flags override kd.toml.
    Run a long command again to continue it.
    """


if __name__ == "__main__":
    main()
