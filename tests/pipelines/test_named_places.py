"""Commands touch the folder that was named, and no other: whatever signs its name has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from teacher_cache.reading.cache import TeacherCache


def kdcli(*words: str) -> Result:
    run = CliRunner().invoke(main, list(words))
    assert "Traceback" not in run.output and (run.exception is None or isinstance(run.exception, SystemExit)), (
        run.output
    )
    return run


@pytest.fixture
def caches(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the caches ``c`` and ``c::v2``."""
    for name in ("c", "c::v2"):
        shutil.copytree(tiny_cache, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["", "file://", "./"])
def test_a_field_is_dropped_of_the_cache_that_was_named(caches: Path, prefix: str) -> None:
    before = everything(caches / "c")
    run = kdcli("cache", "drop-field", f"{prefix}c::v2", "affinity", "--yes")
    assert run.exit_code == 0 and "affinity" not in TeacherCache("c::v2").fields
    assert everything(caches / "c") == before


def test_a_new_cache_goes_where_out_says(caches: Path) -> None:
    before = everything(caches)
    run = kdcli("cache", "subset", "c", "--out", "run::2024/cache", "--parts", "sft", "--fields", "relation")
    assert run.exit_code == 0, run.output
    assert TeacherCache(str(caches / "run::2024" / "cache")).parts() == ["sft"]
    after = everything(caches)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after} == {"c", "c::v2", "run::2024"}


NO_PLACE = {
    ("cache", "status", "simplecache::file://c"): "chained",
    ("cache", "subset", "c", "--out", "simplecache::file://d"): "chained",
    ("cache", "subset", "c", "--out", ""): "empty",
    ("cache", "merge", "c", "zip://c::d.zip", "--out", "d"): "zip://",
    ("cache", "status", "s3:/bucket/c"): "two slashes",
    ("train-student", "--cache", "c", "--student", "s", "--output-dir", "s3://bucket/run"): "disk of this machine",
    ("train-student", "--cache", "c", "--student", "s", "--output-dir", ""): "empty",
    ("train-student", "--cache", "c", "--student", "s", "--local-cache", "s3://bucket/run"): "disk of this machine",
    ("report", "runs", "--out", "s3://bucket/page.html"): "disk of this machine",
    ("report", "runs", "--out", "new/"): "names a folder",
    ("eval", "model", "--data", "x.json", "--out", "s3://bucket/scores.json"): "disk of this machine",
    ("eval", "model", "--data", "x.json", "--answers", "s3:/bucket/scores.json"): "two slashes",
    ("export", "run", "--out", "s3://bucket/model"): "disk of this machine",
    ("ablate", "grid.toml", "--out", "s3://bucket/ablation"): "disk of this machine",
    ("demo", "--out", "s3://bucket/demo"): "disk of this machine",
    ("preflight", "--teacher", "t", "--data", "d", "--student", "s", "--out", ""): "empty",
    ("doctor", "--data", "zip://x.json::x.zip"): "zip://",
    ("doctor", "--data", "a\udcffb.json"): "UTF-8",
}


@pytest.mark.parametrize("words", NO_PLACE, ids=" ".join)
def test_what_is_no_place_is_refused_in_a_line_and_nothing_written(caches: Path, words: tuple[str, ...]) -> None:
    before = everything(caches)
    run = kdcli(*words)
    assert run.exit_code and NO_PLACE[words] in run.output and len(run.output.strip().splitlines()) == 1
    assert everything(caches) == before and {path.name for path in caches.iterdir()} == {"c", "c::v2"}


def test_a_settings_file_names_places_by_the_same_rule(caches: Path) -> None:
    (caches / "kd::1.toml").write_text('cache = "c::v2"\n')
    run = kdcli("cache", "status", "--cache", "c::v2", "--json")
    assert json.loads(run.output)["cache"] == "c::v2"
    (caches / "kd.toml").write_text('cache = "zip::s3://bucket/c"\n')
    assert "chained" in kdcli("cache", "gc").output


@pytest.mark.parametrize("name", ["m::x.json", "s3:/m.json", "./~/m.json"])
def test_a_report_reads_the_file_that_was_named(caches: Path, name: str) -> None:
    from pipelines.report.fidelity_files import read_fidelity

    path = caches / name
    path.parent.mkdir(exist_ok=True)
    body = {
        "samples": 1,
        "rows": {"response": 1, "vision": 1},
        "cache": "c",
        "teacher": "t",
        "dtype": "d",
        "student": "s",
    }
    path.write_text(json.dumps({**body, "distributions": {}, "sweep": [], "terms": {}}))
    for given in (path, Path(name), str(path), name if not name.startswith("s3") else f"./{name}"):
        (one,) = read_fidelity([given])
        assert one.about.startswith("1 samples")


@pytest.mark.parametrize("name", ["pipe:touch made", "a::b", "with blanks ", "x{1..2}", "c*"])
def test_lists_for_webdataset_name_the_cache_that_was_named(caches: Path, name: str) -> None:
    """There ``pipe:`` runs a command, and what looks like a scheme is none of a path."""
    webdataset = pytest.importorskip("webdataset")
    (caches / "c").rename(caches / name)
    listed = kdcli("cache", "urls", f"./{name}", "relation").output.splitlines()
    keys = [one["__key__"] for one in webdataset.WebDataset(listed, shardshuffle=False)]
    assert (
        len(keys) == sum(one.rows for one in TeacherCache(f"./{name}").plan.slices) and not (caches / "made").exists()
    )


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J"])
def test_what_no_line_can_name_is_in_no_list(caches: Path, name: str) -> None:
    (caches / "c").rename(caches / name)
    run = kdcli("cache", "urls", name)
    assert run.exit_code == 1 and "no list of names can hold this one" in run.output
