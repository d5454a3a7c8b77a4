"""Every `kdcli` command that README and docs show is run in a folder laid out as the docs say: literally, but for 512 shards, which would
take as many rows."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
FIRST = [ROOT / "README.md", ROOT / "docs" / "cache.md", ROOT / "docs" / "train.md"]
"""Other pages work with the caches and students of these."""
PAGES = [*FIRST, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page not in FIRST)]
ROWS, SHARDS = 150, 16
"""Of the user's chat mixture, and of the job that README gives 512."""


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's ```bash blocks, comments stripped, words split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def files_shown(page: Path) -> dict[str, str]:
    """The page's ```toml blocks whose first line is ``# NAME.toml``, by that name; stages shortened so that they end."""
    blocks = re.findall(r"```toml\n(# (\w+\.toml)\n.*?)```", page.read_text(), flags=re.DOTALL)
    return {name: re.sub(r"max_steps = \d+", "max_steps = 1", text) for text, name in blocks}


def files_of(page: str) -> list[str]:
    """The ```python blocks of a page on how to add something: each is a whole file."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def methods_shown() -> list[str]:
    return files_of("add_a_method.md")


@pytest.fixture
def user_folder(tmp_path: Path, tiny_teacher: Path, deep_student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: captions.json, train.json, heldout.json, images/, a teacher and a student folder."""
    from pipelines.demo.write_world import write_world

    world = write_world(tmp_path / "world", captions=20, train=ROWS, heldout=8, seed=0, train_format="llava-json")
    for name in ("captions.json", "train.json", "heldout.json", "images"):
        shutil.move(world.folder / name, tmp_path / name)
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.copytree(deep_student, tmp_path / "student")
    for page in PAGES:
        for name, text in files_shown(page).items():
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit_settings(file: Path) -> None:
    """The edits that the README asks for: teacher, student, mixtures; small steps so that it ends."""
    text = file.read_text()
    for old, new in {
        "llava-hf/llava-1.5-7b-hf": "teacher",
        "data/blip_laion_cc_sbu_558k.json": "captions.json",
        "data/pretrain_images": "images",
        "data/llava_v1_5_mix665k.json": "train.json",
        "data/images": "images",
        "path/to/student": "student",
        "runs/llava-kd": "runs",
        "shards = 512": f"shards = {SHARDS}",
        "gradient_accumulation_steps = 16": "gradient_accumulation_steps = 1\nmax_steps = 2",
        "dataloader_num_workers = 4": "dataloader_num_workers = 0",
        "bf16 = true": "bf16 = false",
        'template = "v1"': 'template = "chat"',  # the demo's teacher is no Vicuna
    }.items():
        assert old in text, f"the template no longer says {old!r}"
        text = text.replace(old, new)
    file.write_text(text)


@pytest.mark.timeout(900)  # every command of every page
def test_every_command_of_the_docs_runs(user_folder: Path) -> None:
    import cli

    shown = [command for page in PAGES for command in commands(page)]
    assert len(shown) >= 10, "the docs show the commands of a whole job"
    for command in shown:
        assert command[0] == "kdcli", f"only kdcli commands are shown as bash blocks, got {command}"
        words = [str(SHARDS) if word == "512" and before == "--shards" else word for before, word in pairwise(command)]
        result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{shlex.join(command)}\n{result.output}"
        if command[1] == "init":
            edit_settings(user_folder / "kd.toml")
    assert (user_folder / "runs" / "03-DFT" / "model" / "model.safetensors").is_file()
    assert len(list((user_folder / "cache" / "samples" / "commits").iterdir())) == SHARDS


@pytest.mark.parametrize("number", range(len(methods_shown())))
def test_methods_of_the_docs_train(
    number: int, tiny_cache: Path, deep_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted as they are, they are found by name and take a step."""
    import student_train.methods
    from pipelines.settings import Settings
    from pipelines.train_student import train
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
    from pipelines.cache_teacher import capture
    from pipelines.inspect_cache import survey
    from student_train.cache import Cache, CachedRows
    from teacher_cache.errors import KdcliError

    (text,) = files_of("add_a_field.md")
    folder = tmp_path / "fields"
    folder.mkdir()
    (folder / "confidence_of_the_docs.py").write_text(text)
    monkeypatch.setattr(teacher_cache.fields, "__path__", [*teacher_cache.fields.__path__, str(folder)])
    capture(make_request(tmp_path / "cache", fields=("response_topk", "response_confidence"), shards=2))
    cache, problems = survey(str(tmp_path / "cache"))
    assert isinstance(cache, Cache) and not problems
    rows = CachedRows(cache, cache.parts(), ("response_topk", "response_confidence"))
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
