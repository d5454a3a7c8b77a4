"""Every command that README and docs show is run, line by line: README's in an empty folder that gets the files that README names, then
those of docs/workflow.md with the kd.toml that `kdcli init` writes, edited as the page says; then page by page."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from tests.conftest import ending_as_vicuna
from tests.text_models import build_text_folder, write_rows

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "docs" / "workflow.md"
FIRST = [ROOT / "README.md", WORKFLOW, *(ROOT / "docs" / f"{name}.md" for name in ("cache", "train", "fidelity"))]
"""Other pages work with the caches, students and files of these."""
PLUGIN_GROUPS = tuple(f"kdcli.{kind}" for kind in ("methods", "fields", "sources", "compressors"))
PAGES = [*FIRST, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page not in FIRST)]
ROWS, SHARDS = 90, 8
"""Of the user's chat mixture, and of the job that the kd.toml of `kdcli init` gives 512."""
EDITS = {
    "llava-hf/llava-1.5-7b-hf": "teacher",
    "data/blip_laion_cc_sbu_558k.json": "captions.json",
    "data/pretrain_images": "images",
    "data/llava_v1_5_mix665k.json": "train.json",
    "data/images": "images",
    "path/to/student": "student",
    "shards = 512": f"shards = {SHARDS}",
}
"""What the workflow page tells the user to edit in kd.toml."""
QUICKER = {"dataloader_num_workers = 4": "dataloader_num_workers = 0"}
"""And what no user would: loader processes take longer to start than these rows to read."""


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's ```bash blocks, comments stripped, words split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def files_shown(page: Path) -> dict[str, str]:
    """The page's ```toml and ```python blocks whose first line is ``# NAME.toml`` or ``# NAME.py``, by that name; stages shortened so
    that they end."""
    blocks = re.findall(r"```(?:toml|python)\n(# (\w+\.(?:toml|py))\n.*?)```", page.read_text(), flags=re.DOTALL)
    return {name: re.sub(r"max_steps = \d+", "max_steps = 1", text) for text, name in blocks}


def files_of(page: str) -> list[str]:
    """The ```python blocks of a page on how to add something: each is a whole file."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def methods_shown() -> list[str]:
    return files_of("add_a_method.md")


@pytest.fixture
def user_folder(tmp_path: Path, tiny_teacher: Path, deep_student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty, but for what README says the user has: a teacher and a student of LLaVA-1.5's kind, json files, images; and a language model
    with its rows."""
    from pipelines.demo.write_world import write_world

    here = tmp_path / "here"
    world = write_world(tmp_path / "world", captions=20, train=ROWS, heldout=8, seed=0, train_format="llava-json")
    ending_as_vicuna(tiny_teacher, here / "teacher")
    ending_as_vicuna(deep_student, here / "student")
    build_text_folder(here / "language-model", layers=4)
    for name, rows, seed in (("talk", 120, 0), ("talk-heldout", 6, 1)):
        write_rows(here / f"{name}.jsonl", rows, seed)
    for name in ("captions.json", "train.json", "heldout.json", "images"):
        shutil.move(world.folder / name, here / name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return here


def edit_settings(file: Path) -> None:
    text = file.read_text()
    for old, new in (EDITS | QUICKER).items():
        assert old in text, f"the template no longer says {old!r}"
        text = text.replace(old, new)
    file.write_text(text)


def run(command: list[str]) -> None:
    """A line as a shell runs it, in this process: a kdcli command, whose output may go to a file, or a Python file that the page shows."""
    import cli

    words, _, file = (list(part) for part in _parted(command, ">"))
    if words[0] == "python":
        with redirect_stdout(io.StringIO()) as said:
            runpy.run_path(words[1], run_name="__main__")
        assert len(words) == 2 and said.getvalue(), shlex.join(command)
        return
    assert words[0] == "kdcli", f"only kdcli and python stand in bash blocks, got {command}"
    result = CliRunner().invoke(cli.main, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{shlex.join(command)}\n{result.output}"
    if file:
        Path(file[0]).write_text(result.stdout)
    if words[1] == "init":
        edit_settings(Path("kd.toml"))


def _parted(words: list[str], mark: str) -> Iterator[list[str]]:
    """What stands before the mark, the mark, what stands behind it."""
    at = words.index(mark) if mark in words else len(words)
    yield from (words[:at], words[at : at + 1], words[at + 1 :])


@pytest.mark.timeout(900)  # every command of every page
@pytest.mark.parametrize(
    "pages",
    [FIRST[:2], pytest.param(PAGES, marks=pytest.mark.exhaustive)],
    ids=["README.md and workflow.md", "every page"],
)
def test_every_command_of_the_docs_runs(pages: list[Path], user_folder: Path) -> None:
    """Other pages' commands work with what these two leave; that their words are known is tested below."""
    for page in pages:
        for name, text in files_shown(page).items():
            (user_folder / name).write_text(text)
        for command in commands(page):
            run(command)
        if page == WORKFLOW:
            assert (user_folder / "runs" / "llava-kd" / "03-DFT" / "model" / "model.safetensors").is_file()
            assert len(list((user_folder / "cache" / "samples" / "commits").iterdir())) == SHARDS
            assert "exact match" in (user_folder / "report.html").read_text().lower()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_of_the_docs_has_words_that_the_program_knows(page: Path) -> None:
    """Commands, flags, choices and numbers as click reads them; nothing runs."""
    import cli

    for command in commands(page):
        words, group = next(_parted(command, ">"))[1:], cli.main
        if command[0] == "python":
            assert command[1] in files_shown(page), shlex.join(command)
            continue
        context = click.Context(group)
        while isinstance(group, click.Group):
            name, group, words = group.resolve_command(context, list(words))
            context = click.Context(group, parent=context, info_name=name)
        group.make_context(name, list(words), parent=context.parent)


MEASURED = "docs/fidelity.md"
"""Says how its tables were measured, which takes minutes: the one page with commands that are not run."""


def test_no_command_stands_where_it_is_not_run() -> None:
    hidden = [
        f"{page.relative_to(ROOT)}: {line.strip()}"
        for page in PAGES
        for line in page.read_text().splitlines()
        if re.match(r"(    |\t)+(\$ )?kdcli ", line)
    ]
    assert len(hidden) == 2 and all(one.startswith(MEASURED) for one in hidden), "\n".join(hidden)
    assert sum(len(commands(page)) for page in PAGES) >= 40


@pytest.mark.parametrize("number", range(len(methods_shown())))
def test_methods_of_the_docs_train(
    number: int, tiny_cache: Path, deep_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as they are, they are found by name and take a step."""
    import student_train.methods
    from pipelines.settings import Settings
    from pipelines.train.train_student import train
    from student_train.config import TrainSettings

    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / f"of_the_docs_{number}.py").write_text(methods_shown()[number])
    monkeypatch.setattr(student_train.methods, "__path__", [*student_train.methods.__path__, str(folder)])
    module = importlib.import_module(f"student_train.methods.of_the_docs_{number}")
    settings = TrainSettings(student=str(deep_student), output_dir=str(tmp_path / "run"), max_steps=1, report_to="none")
    train(str(tiny_cache), module.NAME, Settings(train=settings), "DFT")
    (line,) = (tmp_path / "run" / "01-DFT" / "metrics.jsonl").read_text().splitlines()
    assert {f"loss/{name}" for name in module.PRESETS["paper"].terms()} <= json.loads(line).keys()


def test_the_field_of_the_docs_is_captured_and_read(
    make_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as it is, it is found by name, captured, checked, read back, and planned for."""
    import teacher_cache.fields
    from pipelines.capture.cache_teacher import capture
    from pipelines.inspect.cache import survey
    from teacher_cache.errors import KdcliError
    from teacher_cache.reading.cache import TeacherCache
    from teacher_cache.reading.cached_samples import CachedSamples

    (text,) = files_of("add_a_field.md")
    folder = tmp_path / "fields"
    folder.mkdir()
    (folder / "confidence_of_the_docs.py").write_text(text)
    monkeypatch.setattr(teacher_cache.fields, "__path__", [*teacher_cache.fields.__path__, str(folder)])
    capture(make_request(tmp_path / "cache", fields=("response_topk", "response_confidence"), shards=2))
    cache, problems = survey(str(tmp_path / "cache"))
    assert isinstance(cache, TeacherCache) and not problems
    rows = CachedSamples(cache, cache.parts(), ("response_topk", "response_confidence"))
    for row in range(3):
        found = rows.read(0, row).fields
        likeliest = found["response_topk"].log_probs[:, 0]
        assert torch.allclose(found["response_confidence"], likeliest, atol=2e-2) and len(likeliest)
    with pytest.raises(KdcliError, match="field response_confidence: unknown parameters"):
        teacher_cache.fields.create_field("response_confidence", {"k": 3})


def test_the_template_is_valid_and_complete(tmp_path: Path) -> None:
    """Every key that the template shows commented out is accepted too."""
    from pipelines.settings import load_settings, write_template

    target = write_template(tmp_path)
    lines = [re.sub(r"^# (\[|\w+ = )", r"\1", line) for line in target.read_text().splitlines()]
    target.write_text("\n".join(lines))
    tomllib.loads(target.read_text())
    settings = load_settings(target)
    assert settings.capture.over_length == "skip" and settings.fields["vision_topk"] == {"k": 8}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda page: f"{page.parent.name}-{page.name}"
)
def test_names_of_the_code_are_there(page: Path) -> None:
    """Dotted names can be imported, and files of the tests exist."""
    text = page.read_text()
    for name in re.findall(r"`((?:teacher_cache|student_train|pipelines|kdcli)(?:\.[a-zA-Z_]\w*)+)", text):
        if name in PLUGIN_GROUPS:
            continue
        found: Any = importlib.import_module(name.split(".")[0])
        for at, part in enumerate(parts := name.split(".")[1:], start=1):
            found = getattr(found, part, None) or importlib.import_module(".".join([name.split(".")[0], *parts[:at]]))
    for path, test in re.findall(r"`(?:tests/)?((?:[a-z_]+/)*test_\w+\.py)(?:::(\w+))?", text):
        file = ROOT / "tests" / path
        assert file.is_file(), f"{page.name}: tests/{path} is not there"
        assert f"def {test}" in file.read_text(), f"{page.name}: tests/{path} has no {test}"


def anchors(page: Path) -> list[str]:
    """Of the page's headings, as GitHub makes them: lower case, hyphens for spaces, other marks dropped."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        found = anchors(page.parent / target if target else page).count(anchor)
        assert found == 1, f"{page.name} links to #{anchor}, which {found} headings have"


def test_the_index_of_decisions_has_every_record() -> None:
    page = ROOT / "docs" / "decisions.md"
    records = [anchor for anchor in anchors(page) if re.match(r"\d{4}-\d\d-\d\d-", anchor)]
    listed = re.findall(r"^- \[.*\]\(#(.*)\)$", page.read_text(), flags=re.MULTILINE)
    assert listed == records and len(records) > 50


def test_the_style_page_names_files_that_are_there() -> None:
    lines = [
        line.split("|") for line in (ROOT / "docs" / "style.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert len(lines) >= 10
    for _, folder, _, example, *_ in lines:
        house, name = (cell.split("`")[1] for cell in (folder, example))
        place = ROOT / name if name.startswith("tests/") else ROOT / house.replace("*/", "") / name
        assert place.is_file(), f"{place} is not there"
