"""Edits of kd.toml: what changes is exactly what was asked, or nothing changes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines.judge.preflight.kd_toml import block, edited, tables_of, write
from pipelines.settings import load_settings, write_template
from teacher_cache.errors import KdcliError

TABLES = tables_of(
    "standard", "pre/cache", {"vision_topk": {"k": 4}, "vision_hidden": {"codec": "sketch", "step": 0.02}}
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[capture]\n",
        '[capture] # c\nstore = "exact" # s\n\n[train]\nstudent = "x"\n',
        "[capture]\nstore = 'exact'\nfields = []\n\n[fields.vision_hidden]\ncodec = \"int8\"\n",
        "[fields.vision_topk]\nk = 64    # wide\n[fields.vision_hidden]\nstep=0.5\ncodec_version = 1\n",
        '[[data]]\npart = "sft"\npath = "x"',
        "fields.vision_topk.k = 64\n",
        "[fields]\nvision_topk = {k = 64}\n",
        'capture = {store = "exact"}\n',
        "[capture]\nfields = [\n  'x',\n]\n",
        "[fields.vision_topk]\nk = 64\n\n[train]\nstudent = 'x' # s\n\n[fields.vision_hidden]\nstep = 0.5 # t\n",
    ],
)
def test_the_result_says_what_was_asked_and_all_the_rest(text: str) -> None:
    old, new = tomllib.loads(text), tomllib.loads(edited(text, TABLES))
    assert new["capture"] == {**old.get("capture", {}), "store": "standard", "calibration": "pre/cache"}
    assert new["fields"] == {"vision_topk": {"k": 4}, "vision_hidden": {"codec": "sketch", "step": 0.02}}
    assert {key: value for key, value in new.items() if key not in ("capture", "fields")} == {
        key: value for key, value in old.items() if key not in ("capture", "fields")
    }
    kept = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert all(comment in edited(text, TABLES) for comment in kept)
    assert edited(edited(text, TABLES), TABLES) == edited(text, TABLES)


def test_another_codec_leaves_no_step_behind() -> None:
    tables = tables_of("standard", "c", {"vision_hidden": {"codec": "int8"}})
    assert tomllib.loads(edited("[fields.vision_hidden]\nstep = 0.1\n", tables))["fields"] == {
        "vision_hidden": {"codec": "int8"}
    }


def test_a_key_stands_behind_the_others_and_above_the_comments() -> None:
    text = '[capture]\nstore = "exact"   # s\n# workers = 0\n\n# a student\n[train]\nbf16 = true\n'
    assert edited(text, {"capture": {"calibration": "c"}}) == text.replace("# s\n", '# s\ncalibration = "c"\n')


@pytest.mark.parametrize("text", ["capture = 3\n", "[fields]\nvision_topk = 'k'\n", "fields = []\n", "[[capture]]\n"])
def test_what_is_no_table_is_left_alone(tmp_path: Path, text: str) -> None:
    with pytest.raises(KdcliError, match=r"as \[capture\] and \[fields.NAME\]"):
        edited(text, TABLES)
    file = tmp_path / "kd.toml"
    file.write_text(text)
    result = write(file, TABLES)
    assert not result["written"] and "by hand" in result["why"] and file.read_text() == text
    assert tomllib.loads(result["block"])["capture"]["calibration"] == "pre/cache"


def test_the_template_takes_it(tmp_path: Path) -> None:
    file = write_template(tmp_path)
    before = file.read_text()
    result: dict[str, Any] = write(file, TABLES)
    assert result["written"] and list(tmp_path.iterdir()) == [file], "no draft stays"
    settings = load_settings(file)
    assert settings.capture.calibration == "pre/cache" and settings.fields["vision_hidden"]["step"] == 0.02
    lost = [line for line in before.splitlines() if line.startswith("#") and line not in file.read_text()]
    assert not lost
    assert write(file, TABLES)["diff"] == ""


def test_without_a_file_the_block_is_shown(tmp_path: Path) -> None:
    for path in (None, tmp_path / "kd.toml"):
        result = write(path, TABLES)
        assert not result["written"] and result["block"] == block(TABLES)
