"""Completion as a shell asks for it: in a process of its own, without torch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from cli import main
from pipelines.command_line import completion

ROOT = Path(__file__).parents[3]
PROGRAM = "import sys; from cli import main; sys.argv = ['kdcli']; main(prog_name='kdcli')"


def offered(*words: str) -> list[str]:
    """What is offered for the last word."""
    asked = ShellComplete(main, {}, "kdcli", "_KDCLI_COMPLETE")
    return [one.value for one in asked.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_a_shell(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_KDCLI_COMPLETE={shell}_complete" in result.stdout and "kdcli" in result.stdout


def test_a_shell_asks_and_has_its_answer_within_a_second() -> None:
    asked = {"_KDCLI_COMPLETE": "bash_complete", "COMP_WORDS": "kdcli train-student --method ll", "COMP_CWORD": "3"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.split() == ["plain,llava-kd", "plain,llavadi"], done.stderr
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


def test_completing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from pipelines.command_line.completion import VALUES; [list(one()) for one in VALUES.values()]; "
        "print(sorted({'torch', 'transformers', 'pyarrow', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_those_of_the_registries() -> None:
    from student_train.compressors import compressor_modules
    from student_train.methods import method_modules
    from teacher_cache.fields import field_kinds

    assert sorted(offered("train-student", "--method", "")) == sorted(method_modules())
    assert sorted(offered("train-student", "--compressor", "")) == sorted([*compressor_modules(), "none"])
    assert sorted(offered("cache-teacher", "--fields", "")) == sorted(field_kinds())


def test_what_else_completes() -> None:
    assert offered("pref") == ["preflight"]
    assert offered("cache", "add-") == ["add-field"]
    assert offered("cache-teacher", "--store", "s") == ["standard"]
    assert offered("cache-teacher", "--fields", "affinity,rel") == ["affinity,relation"]
    assert offered("train-student", "--stages", "DPT,D") == ["DPT,DPT", "DPT,DFT"]
    assert offered("train-student", "--report-to", "tensorboard,w") == ["tensorboard,wandb"]
    assert offered("eval", "model", "--compress", "") == ["dart", "fastv", "pyramiddrop", "random"]
    for command in ("preflight", "cache-teacher", "cache add-field", "cache repair"):
        assert offered(*command.split(), "--backend", "") == ["transformers", "vllm"]
        assert offered(*command.split(), "--vllm-route", "h") == ["hidden"]
    assert "--report-to" in offered("train-student", "--re")
