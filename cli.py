"""kdcli: run the teacher once, train every student from disk. The commands are in ``pipelines/command_line``."""

from __future__ import annotations

import os
from typing import Any

import click

import pipelines.quiet_threads  # noqa: F401 (before any command imports torch)
from pipelines.command_line import capture, judging, planning, start, training
from pipelines.command_line.cache import cache_group
from pipelines.command_line.tour import TourGroup


class Group(TourGroup):
    """Prints the project's own errors as one line, and the signal that ended a command."""

    def invoke(self, ctx: click.Context) -> Any:
        from teacher_cache import stopping
        from teacher_cache.errors import KdcliError, one_line, out_of_memory

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
            if error.filename is None or not error.strerror:
                raise
            raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise click.ClickException(
                f"out of memory ({one_line(error)[:200] or 'MemoryError'}): work in smaller batches, with fewer processes, or on a machine "
                "with more; what is written stays"
            ) from None


COMMANDS = (
    *(start.demo, start.init, start.methods, start.completion),
    *(planning.doctor, planning.plan, planning.preflight),
    *(capture.cache_teacher, cache_group),
    *(training.train_student, training.ablate),
    *(judging.evaluate, judging.evaluation_tasks, judging.fidelity, judging.report, judging.export_model),
)


@click.group(
    cls=Group,
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="kdcli")
def main() -> None:
    """Run the multimodal teacher once, write down what students need, train as many students as you like from disk.

    \b
    Every command has -h, with an example. What a kd.toml says (`kdcli init` writes one), flags say otherwise.
    Long commands continue when they are run again.
    """


if __name__ == "__main__":
    main()
