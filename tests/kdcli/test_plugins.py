"""A package of somebody else, built, installed and found by its entry points: a method, a field, a source and a compressor."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import kdcli
from cli import main
from teacher_cache.errors import KdcliError

DOCS = Path(__file__).parents[2] / "docs"

SOURCE = '''
"""Tab-separated rows: image, question, answer."""

from pathlib import Path

from teacher_cache.records import Image, RowGroup, Sample, Turn
from teacher_cache.sources.files import fingerprint_files

FORMAT = "acme-tsv"


def matches(paths):
    return all(path.endswith(".tsv") for path in paths)


def open(spec, paths):
    return Rows(spec, paths)


class Rows:
    def __init__(self, spec, paths):
        self.spec, self.paths = spec, paths
        self.lines = [line.split("\\t") for line in Path(paths[0]).read_text().splitlines()]

    def fingerprint(self):
        return fingerprint_files(FORMAT, self.paths)

    def scan(self, group_rows):
        starts = range(0, len(self.lines), group_rows)
        return [RowGroup(at, len(self.lines[at : at + group_rows]), {"file": 0}, 100, 1) for at in starts]

    def read(self, group):
        for number in range(group.start, group.start + group.rows):
            image, question, answer = self.lines[number]
            data = (Path(self.spec.image_root) / image).read_bytes()
            turns = (Turn("user", f"<image>\\n{question}"), Turn("assistant", answer))
            yield Sample(self.spec.part, number, str(number), f"line {number + 1}", turns, (Image(image, data),))
'''
COMPRESSOR = '''
"""adaptive_pool under another name."""

from student_train.compressors.adaptive_pool import CHOOSES_LAYERS, ELASTIC, build, grid, settle, training_grid

NAME, PAPER = "acme_pool", "none"
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-distil"
version = "1.2"

[project.entry-points]
"""


def shown(page: str) -> str:
    """The first file that a page shows."""
    (text, *_) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return str(text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages, into which pip put acme-distil 1.2: a module of each kind."""
    here = tmp_path_factory.mktemp("plugin")
    package = here / "project" / "acme_distil"
    package.mkdir(parents=True)
    method, field = shown("add_a_method.md"), shown("add_a_field.md")
    modules = {"methods": method, "fields": field, "sources": SOURCE, "compressors": COMPRESSOR}
    points = [f'"kdcli.{group}" = {{acme = "acme_distil.{group}"}}' for group in modules]
    (package.parent / "pyproject.toml").write_text(PROJECT + "\n".join(points))
    for name, text in {"__init__": "", **modules}.items():
        (package / f"{name}.py").write_text(text)
    words = "install --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check --target"
    pip = [sys.executable, "-m", "pip", *words.split(), str(here / "site"), str(package.parent)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(package)
    return here / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


def run(*words: str) -> str:
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_kind_of_plug_in_works(
    installed: None, world: Any, tiny_teacher: Path, here: Path, tmp_path: Path
) -> None:
    """Rows of a new format are captured with a new field, read in Python, and trained on by a new method and with a new compressor."""
    (name,) = re.findall(r'^NAME = "(.+)"', shown("add_a_method.md"), flags=re.MULTILINE)
    assert name in run("methods")
    images = sorted(str(path.relative_to(world.images)) for path in Path(world.images).rglob("*.png"))[:6]
    table = tmp_path / "rows.tsv"
    table.write_text("\n".join(f"{image}\tWhat is there?\tpicture {i}" for i, image in enumerate(images)))
    words = f"cache-teacher --teacher {tiny_teacher} --data {table} --image-root {world.images} --out mine --shards 2 --workers 1"
    run(*words.split(), "--fields", "response_hidden,vision_hidden,response_confidence", "--dtype", "float32")
    cache = kdcli.open_cache("mine")
    assert cache.rows == {"sft": 6}
    teacher = cache.signals(range(6), needs="response_logits", fields=["response_confidence"])
    likeliest = teacher.top_k(1)[1][:, 0].split(teacher.counts())
    for ours, theirs in zip(teacher.records("response_confidence"), likeliest, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-2)
    told = "train-student --student student --cache mine --stages DFT --max-steps 1 --report-to none --dataloader-num-workers 1"
    run(*told.split(), "--method", name, "--output-dir", "by-the-method")
    run(*told.split(), "--method", "kd", "--compressor", "acme_pool", "--output-dir", "compressed")
    config = json.loads((here / "compressed" / "01-DFT" / "model" / "config.json").read_text())
    assert (here / "by-the-method" / "01-DFT" / "model").is_dir() and "acme_pool" in json.dumps(config)


def test_without_the_package_nothing_of_it_is_known() -> None:
    with pytest.raises(KdcliError, match="unknown compressor 'acme_pool'"):
        from student_train.compressors import compressor_module

        compressor_module("acme_pool")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import nothing_like_this",
            r"it cannot be imported \(ModuleNotFoundError: No module named 'nothing_like_this'\)",
        ),
        ("NAME = 'acme'", "the module has no PAPER"),
        ("from student_train.methods.kd import *\nNAME, STAGES = 'kd', 'DFT'", "its name 'kd' is kdcli's own"),
    ],
)
def test_a_bad_plug_in_is_one_line_that_names_its_package(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "acme_worse-0.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-worse\nVersion: 0.9\n")
    (metadata / "entry_points.txt").write_text("[kdcli.methods]\nacme = acme_worse\n")
    (tmp_path / "acme_worse.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_worse", raising=False)
    done = CliRunner().invoke(main, ["methods"])
    (line,) = done.output.strip().splitlines()
    assert done.exit_code == 1 and re.search(rf"plug-in acme of package acme-worse 0\.9 .*: {said}", line), done.output
