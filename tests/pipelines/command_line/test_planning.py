"""``doctor`` and ``plan`` as a user types them: what they say aloud, their exit status, and that doctor, plan and capture agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner, Result

from cli import main


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``rows.json`` (20 rows with a picture, of which 4 are empty answers) and ``long.json``."""
    (tmp_path / "images").mkdir()
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "red.png")
    rows = [
        {"id": str(i), "image": "red.png", "conversations": talk("<image>\nWhat?", "" if i % 5 == 0 else "Red.")}
        for i in range(20)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    long = [
        {
            "id": "cut",
            "image": "red.png",
            "conversations": talk("<image>\nWhat?", "Red.", "More, please. " * 20, "It is red. " * 20),
        },
        {
            "id": "lost",
            "image": ["red.png"] * 2,
            "conversations": talk("<image>", "Red.", "<image>\nAnd this?", "Red too."),
        },
        {"id": "short", "image": "red.png", "conversations": talk("<image>\nWhat?", "Red.")},
        {"id": "never", "conversations": talk("What?", "It is red. " * 60)},
    ]
    (tmp_path / "long.json").write_text(json.dumps(long))
    monkeypatch.chdir(tmp_path)
    return tmp_path


IMAGES = ("--image-root", "images")


def test_strict_fails_where_more_is_defective(folder: Path) -> None:
    assert run("doctor", "rows.json", *IMAGES).exit_code == 0
    assert run("doctor", "rows.json", *IMAGES, "--strict", "0.2").exit_code == 0
    refused = run("doctor", "rows.json", *IMAGES, "--strict", "0.19")
    assert refused.exit_code == 1
    assert "Error: --strict 0.19: 20.00% of part 'sft' is defective" in refused.stderr
    assert "20 rows = 16 usable" in refused.stdout
    as_json = run("doctor", "rows.json", *IMAGES, "--strict", "0", "--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["defective"] == 4
    assert run("doctor", "rows.json", *IMAGES, "--strict", "1.5").exit_code == 2


def test_all_names_every_row_and_json_every_defect(folder: Path) -> None:
    rows = [{"id": str(i), "conversations": talk("hi", "")} for i in range(30)]
    (folder / "bad.json").write_text(json.dumps(rows))
    few = run("doctor", "bad.json").stdout
    assert "bad.json row 4" in few and "bad.json row 5" not in few
    lines = [line for line in run("doctor", "bad.json", "--all").stdout.splitlines() if line.startswith("sft  ")]
    assert lines == [f"sft  empty_answer  bad.json row {i}  id '{i}'  turn 1 is ''" for i in range(30)]
    found = json.loads(run("doctor", "bad.json", "--json").stdout)["parts"][0]["defects"]["empty_answer"]
    assert [one["place"] for one in found["examples"]] == [f"bad.json row {i}" for i in range(30)]


def test_show_prints_tokens_with_labels(folder: Path, tiny_teacher: Path) -> None:
    found = run("doctor", "rows.json", *IMAGES, "--teacher", tiny_teacher, "--show", "1")
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith("| '")]
    assert ["|", "'<|assistant|>'", "|", "2", "|", "assistant", "|", "–", "|"] in lines
    assert lines[-1] == ["|", "'<|end|>'", "|", "4", "|", "assistant", "|", "label,", "ends", "|"]
    assert "rows.json row 1: 47 tokens, 36 of them of images, " in found.stdout
    shown = json.loads(run("doctor", "rows.json", *IMAGES, "--teacher", tiny_teacher, "--show", "1", "--json").stdout)
    (row,) = shown["parts"][0]["shown"]
    assert row["tail"][-1] == {"token": "<|end|>", "id": 4, "role": "assistant", "label": True, "end": True}
    for flag, value in (("--show", "1"), ("--max-length", "9"), ("--over-length", "cut")):
        refused = run("doctor", "rows.json", *IMAGES, flag, value)
        assert refused.exit_code == 1 and f"Error: {flag} needs a tokenizer: name its model" in refused.stderr


@pytest.mark.parametrize("command", ["doctor", "plan", "cache-teacher"])
def test_answers_without_an_end_are_said_aloud(folder: Path, endless_teacher: Path, command: str) -> None:
    """In --json too; captions end as they should."""
    parts = ("--data", "rows.json", "--part", "caption", "--template", "plain", "--data", "rows.json", "--part", "sft")
    more = {"doctor": (), "plan": ("--shards", "2"), "cache-teacher": ("--shards", "2", "--store", "none", "--out")}[
        command
    ]
    for number, flags in enumerate(((), ("--json",))):
        out = (f"cache-{number}",) if command == "cache-teacher" else ()
        found = run(command, *parts, "--template", "chat", *IMAGES, "--teacher", endless_teacher, *more, *out, *flags)
        assert found.exit_code == 0, found.output
        if flags:
            body = json.loads(found.stdout)
            said = body["notes"] if command == "cache-teacher" else body["warnings"]
        else:
            said = [line for line in found.stdout.splitlines() if "WARNING" in line]
        (line,) = said
        looked = re.search(r"part 'sft', template 'chat': in (\d+) of \1 rows looked at no label ends an answer", line)
        assert looked and (command == "cache-teacher" or looked[1] == "16"), line


def test_a_capture_warns_before_it_begins(folder: Path, endless_teacher: Path) -> None:
    flags = ("--shards", "1", "--out", "cache", "--fields", "response_topk", "--device", "cpu", "--k", "0")
    found = run("cache-teacher", "--teacher", endless_teacher, "--data", "rows.json", *IMAGES, *flags[:-2])
    before, _, behind = found.stderr.partition("capturing")
    assert "WARNING: part 'sft'" in before and "capturing" in found.stderr and "WARNING" not in behind
    assert "note: WARNING: part 'sft'" in found.stdout


def test_doctor_plan_and_capture_agree_about_cuts(folder: Path, tiny_teacher: Path) -> None:
    """Three of four rows do not fit: two are cut, and one loses a picture; the last has one answer alone, which is never cut."""
    data = ("--data", "long.json", *IMAGES, "--teacher", tiny_teacher, "--max-length", "60", "--over-length", "cut")
    (part,) = json.loads(run("doctor", *data, "--json").stdout)["parts"]
    assert (part["rows"], part["usable"]) == (4, 3)
    assert (part["notes"]["cut"]["count"], part["notes"]["cut_images"]["count"]) == (2, 1)
    assert part["defects"]["over_length"]["examples"][0]["source_id"] == "never"
    body = json.loads(run("plan", *data, "--shards", "1", "--json").stdout)
    assert (body["parts"][0]["cut_rows"], body["parts"][0]["cut_images"]) == (2, 1)
    assert any("about 2 rows are cut" in note and "lose about 1 images" in note for note in body["notes"])
    assert body["parts"][0]["skipped_share"] == {"over_length": 0.25}
    made = run("cache-teacher", *data, "--shards", "1", "--store", "none", "--out", "cache")
    line = "4 rows in the plan: 3 written, 1 skipped (1 over_length); 2 cut at a turn border to fit max_length, 1 image lost"
    assert line in made.stdout and line in run("cache", "status", "cache").stdout
    assert run("cache", "subset", "cache", "--parts", "sft", "--out", "half").exit_code == 0
    assert line in run("cache", "status", "half").stdout, "a copied row stays cut"


def test_a_wrong_value_of_over_length_is_refused(folder: Path) -> None:
    (folder / "kd.toml").write_text(
        '[capture]\nover_length = "trim"\n[[data]]\npart = "sft"\npath = "long.json"\nimage_root = "images"\n'
    )
    found = run("doctor")
    assert found.exit_code == 1 and "over_length must be skip or cut, got 'trim'" in found.stderr


def test_a_forgotten_image_root_is_said_with_its_fix(folder: Path) -> None:
    found = run("doctor", "rows.json", "--json")
    (line,) = json.loads(found.stdout)["warnings"]
    assert "20 of 20 rows fail for one reason, image_missing" in line and "--image-root FOLDER" in line
    assert f"WARNING: {line}" in run("doctor", "rows.json").stdout


@pytest.mark.parametrize("store", ["standard", "compact"])
def test_a_plan_says_what_it_assumes(folder: Path, tiny_teacher: Path, store: str) -> None:
    """The ends of the preflight's ladder beside it, where there is one: bf16 hidden states are exactly those of the field."""
    data = ("--data", "rows.json", *IMAGES, "--teacher", tiny_teacher, "--shards", "1", "--store", store)
    body = json.loads(run("plan", *data, "--json").stdout)
    text = run("plan", *data).stdout
    (line,) = [one for one in text.splitlines() if one.startswith("- Assumes")]
    if store == "compact":
        assert line == "- Assumes --store compact: response_topk (k 50), vision_topk (k 50)."
        return
    assert (
        "- Assumes --store standard: response_topk (k 8), vision_topk (k 8), response_hidden (codec sketch, step 0.04)"
        in line
    )
    rungs = body["assumes"]["preflight"]
    assert list(rungs) == ["top-4 + sketch 0.1", "top-16 + sketch 0.01", "bf16 hidden"]
    assert rungs["top-4 + sketch 0.1"] < body["bytes"] < rungs["top-16 + sketch 0.01"]
    (folder / "kd.toml").write_text(
        '[fields.response_hidden]\ncodec = "bf16"\n[fields.vision_hidden]\ncodec = "bf16"\n'
    )
    four = "\n[fields.response_topk]\nk = 4\n[fields.vision_topk]\nk = 4\n"
    (folder / "kd.toml").write_text((folder / "kd.toml").read_text() + four)
    chosen = json.loads(run("plan", *data, "--json").stdout)
    assert chosen["bytes"] == rungs["bf16 hidden"] == chosen["assumes"]["preflight"]["bf16 hidden"]
    (folder / "kd.toml").write_text('[capture]\ncalibration = "preflight/cache"\n')
    assert json.loads(run("plan", *data, "--json").stdout)["assumes"]["preflight"] == {}
