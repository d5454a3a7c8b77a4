"""Rows as other tools write them mean the same in every format: the same turns and images, or a skip for the same reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.errors import ROW_NOTES, SKIP_REASONS
from teacher_cache.records import Sample, SkipRecord
from teacher_cache.sources import DataSpec, open_source, source_modules
from teacher_cache.sources.usable_samples import check_turns, row_key

PICTURES = {"a.png": b"no reader decodes", "b.png": b"what an image holds"}


def named(row: dict[str, Any]) -> list[str]:
    found = [row.get(name) or [] for name in ("image", "images")]
    return list(dict.fromkeys(one for each in found for one in (each if isinstance(each, list) else [each])))


def write_json(folder: Path, row: dict[str, Any]) -> str:
    (folder / "rows.json").write_text(json.dumps([row]))
    return "rows.json"


def write_lines(folder: Path, row: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return "rows.jsonl"


def write_tar(folder: Path, row: dict[str, Any]) -> str:
    members = [("k.json", json.dumps(row).encode()), *((f"k.{name}", PICTURES.get(name, b"")) for name in named(row))]
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return "rows.tar"


def write_parquet(folder: Path, row: dict[str, Any]) -> str:
    def stored(value: Any) -> Any:
        if isinstance(value, list):
            return [stored(one) for one in value]
        return {"bytes": PICTURES.get(value), "path": value} if value else None

    written = {name: stored(value) if name in ("image", "images") else value for name, value in row.items()}
    pq.write_table(pa.Table.from_pylist([written]), folder / "rows.parquet")
    return "rows.parquet"


WRITERS = {
    "llava-json": write_json,
    "messages-jsonl": write_lines,
    "webdataset": write_tar,
    "llava-next-parquet": write_parquet,
}


def read(folder: Path, row: dict[str, Any]) -> dict[str, Sample | SkipRecord]:
    """The row by format."""
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    assert set(WRITERS) == set(source_modules())
    found = {}
    for name, write in WRITERS.items():
        source = open_source(DataSpec("sft", str(folder / write(folder, row))))
        (found[name],) = [one for group in source.scan(10) for one in source.read(group)]
    return found


def talk(*texts: Any, by: tuple[str, str] = ("human", "gpt"), keys: tuple[str, str] = ("from", "value")) -> list[Any]:
    return [{keys[0]: by[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def chat(*contents: Any) -> list[Any]:
    return talk(*contents, by=("user", "assistant"), keys=("role", "content"))


def last(turns: list[Any], **more: Any) -> list[Any]:
    return [*turns[:-1], {**turns[-1], **more}]


ASKED = "<image>\nWhat?"
LOOK = {"image": "a.png", "conversations": talk(ASKED, "Red.")}
BRIEF = {"role": "system", "content": "Be brief."}
PART, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}

USED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "Human and GPT": ({"image": "a.png", "conversations": talk(ASKED, "Red.", by=("Human", "GPT"))}, [ASKED, "Red."], "a"),
    "USER": ({"image": "a.png", "conversations": talk(ASKED, "Red.", by=("USER", "ASSISTANT"))}, [ASKED, "Red."], "a"),
    "bot": ({"conversations": talk("Hi", "Ho", by=("user", "bot"))}, ["Hi", "Ho"], ""),
    "model": ({"conversations": talk("Hi", "Ho", by=("human", "model"))}, ["Hi", "Ho"], ""),
    "chatgpt": ({"conversations": talk("Hi", "Ho", by=("human", "chatgpt "))}, ["Hi", "Ho"], ""),
    "role and content": ({"image": "a.png", "conversations": chat(ASKED, "Red.")}, [ASKED, "Red."], "a"),
    "role and value": ({"conversations": talk("Hi", "Ho", keys=("role", "value"))}, ["Hi", "Ho"], ""),
    "messages": ({"image": "a.png", "messages": chat(ASKED, "Red.")}, [ASKED, "Red."], "a"),
    "messages of from and value": ({"messages": talk("Hi", "Ho")}, ["Hi", "Ho"], ""),
    "messages without a place": ({"images": ["a.png", "b.png"], "messages": chat("What?", "Red.")}, ["<image>\n" + ASKED, "Red."], "ab"),
    "parts": ({"images": ["a.png"], "messages": chat([PART, TEXT], [{"type": "text", "text": "Red."}])}, [ASKED, "Red."], "a"),
    "parts in conversations": ({"image": "a.png", "conversations": talk([PART, TEXT], [TEXT])}, [ASKED, "What?"], "a"),
    "prompt and completion": ({"image": "a.png", "prompt": "What?", "completion": "Red."}, [ASKED, "Red."], "a"),
    "prompt beside turns": ({**LOOK, "prompt": "another"}, [ASKED, "Red."], "a"),
    "images beside no image": ({"images": ["a.png"], "conversations": talk(ASKED, "Red.")}, [ASKED, "Red."], "a"),
    "a list of images": ({"image": ["a.png", "b.png"], "conversations": talk("<image><image>", "x")}, ["<image><image>", "x"], "ab"),
    "image and images are the same": ({**LOOK, "images": ["a.png"]}, [ASKED, "Red."], "a"),
    "both columns of turns": ({**LOOK, "messages": chat(ASKED, "Red.")}, [ASKED, "Red."], "a"),
    "system as a column": ({**LOOK, "system": "Be brief."}, ["Be brief.", ASKED, "Red."], "a"),
    "an empty system": ({**LOOK, "system": ""}, [ASKED, "Red."], "a"),
    "system twice": ({"system": "Be brief.", "messages": [BRIEF, *chat("Hi", "Ho")]}, ["Be brief.", "Hi", "Ho"], ""),
    "weight 1": ({"conversations": last(talk("Hi", "Ho"), weight=1), "weight": 1.0}, ["Hi", "Ho"], ""),
    "weight 0 of a question": ({"messages": [{"role": "user", "content": "Hi", "weight": 0}, *chat("Hi", "Ho")[1:]]}, ["Hi", "Ho"], ""),
    "no media": ({"conversations": talk("Hi", "Ho"), "video": "", "videos": [], "audio": None}, ["Hi", "Ho"], ""),
    "speaks of a tag": ({"conversations": talk("Has the <video> tag sound?", "ok")}, ["Has the <video> tag sound?", "ok"], ""),
    "a tag in an answer": ({"conversations": talk("Hi", "<video>")}, ["Hi", "<video>"], ""),
    "quotes a tag": ({"conversations": talk("Explain `<audio>`", "ok")}, ["Explain `<audio>`", "ok"], ""),
    "closes a tag": ({"conversations": talk("Fix <video>\n<source>\n</video>", "ok")}, ["Fix <video>\n<source>\n</video>", "ok"], ""),
    "an html image": ({"conversations": talk("Explain <img> here", "ok")}, ["Explain <img> here", "ok"], ""),
    "names a placed image": ({"image": "a.png", "conversations": talk("<image>\n<image_1>?", "x")}, ["<image>\n<image_1>?", "x"], "a"),
}  # fmt: skip


@pytest.mark.parametrize("case", USED)
def test_rows_that_are_read(tmp_path: Path, case: str) -> None:
    row, texts, images = USED[case]
    for name, made in read(tmp_path, row).items():
        assert isinstance(made, Sample), (name, made)
        assert [turn.text for turn in made.turns] == texts, name
        assert [turn.role for turn in made.turns][-2:] == ["user", "assistant"], name
        assert [image.data for image in made.images] == [PICTURES[f"{one}.png"] for one in images], name
        assert made.notes == (), name
        check_turns(made)


def asked(text: Any, **columns: Any) -> dict[str, Any]:
    return {"conversations": talk(text, "x"), **columns}


SKIPPED: dict[str, tuple[dict[str, Any], str, str]] = {
    "video": (asked("<video>\nHi", video="a.mp4"), "media_unsupported", "'video': 'a.mp4'"),
    "video without a place": ({**LOOK, "video": "a.mp4"}, "media_unsupported", "'video'"),
    "videos": ({"messages": chat("Hi", "Ho"), "videos": ["a.mp4"]}, "media_unsupported", "'videos'"),
    "audios": ({"messages": chat("Hi", "Ho"), "audios": [{"path": "a.wav"}]}, "media_unsupported", "'audios'"),
    "audio_path": ({"prompt": "Hi", "completion": "Ho", "audio_path": "a.wav"}, "media_unsupported", "'audio_path'"),
    "<video> alone": (asked("<video>\nHi"), "media_unsupported", "turn 0 holds '<video>'"),
    "<video> in the middle": (asked("What happens in <video>?"), "media_unsupported", "'<video>'"),
    "<audio> beside an image": (asked("<image>\n<audio>\nHi", image="a.png"), "media_unsupported", "'<audio>'"),
    "<|video_pad|>": (asked("<|video_pad|>Hi"), "media_unsupported", "'<|video_pad|>'"),
    "<video_1>": (asked("<video_1> Hi"), "media_unsupported", "'<video_1>'"),
    "a video part": ({"messages": chat([{"type": "video"}, TEXT], [TEXT])}, "media_unsupported", "type 'video'"),
    "an audio part": ({"messages": chat([{"type": "input_audio"}, TEXT], [TEXT])}, "media_unsupported", "'input_audio'"),
    "<image_1>": (asked("<image_1>\nHi", image="a.png"), "placeholder_mismatch", "turn 0 holds '<image_1>'"),
    "<image_1> of messages": ({"messages": chat("<image_1> Hi", "x"), "images": ["a.png"]}, "placeholder_mismatch", "'<image_1>'"),
    "<image 1>": (asked("see <image 1>", image="a.png"), "placeholder_mismatch", "'<image 1>'"),
    "<|image|>": (asked("<|image|>Hi"), "placeholder_mismatch", "'<|image|>', and the row has 0 images"),
    "<|image_1|>": ({"messages": chat("<|image_1|>\nHi", "x"), "image": "a.png"}, "placeholder_mismatch", "'<|image_1|>'"),
    "<IMAGE>": (asked("<IMAGE>\nHi", image="a.png"), "placeholder_mismatch", "'<IMAGE>'"),
    "[IMG]": ({"messages": chat("[IMG]Hi", "x"), "image": "a.png"}, "placeholder_mismatch", "'[IMG]'"),
    "<img>path</img>": (asked("Picture 1: <img>a.png</img> Hi"), "placeholder_mismatch", "'<img>a.png</img>'"),
    "a video as image": (asked("<image>\nHi", image="a.mp4"), "media_unsupported", "a.mp4'"),
    "images in another column": ({"messages": chat("Hi", "x"), "image_path": "a.png"}, "image_missing", "'image_path', which is not read"),
    "function_call": ({"conversations": talk("Hi", "{}", by=("human", "function_call"))}, "tools_unsupported", "by 'function_call'"),
    "observation": ({"conversations": talk("{}", "x", by=("observation", "gpt"))}, "tools_unsupported", "'observation'"),
    "tool": ({"messages": talk("Hi", "x", by=("user", "tool"), keys=("role", "content"))}, "tools_unsupported", "message 1 is by 'tool'"),
    "tool_calls": ({"messages": last(chat("Hi", None), tool_calls=[{"id": "1"}])}, "tools_unsupported", "message 1 has 'tool_calls'"),
    "another role": ({"messages": [*chat("Hi"), {"role": "robot", "content": "x"}]}, "bad_row", "'robot', not one of human, user, gpt"),
    "a row of weight 0": (asked("Hi", weight=0.0), "not_for_training", "the row says 'weight': 0.0"),
    "a row not to train": (asked("Hi", train=False), "not_for_training", "'train': False"),
    "an answer of weight 0": ({"messages": last(chat("a", "b", "c", "d"), weight=0)}, "not_for_training", "message 3 says 'weight': 0"),
    "an answer without loss": ({"conversations": last(talk("a", "b"), loss=False)}, "not_for_training", "turn 1 says 'loss'"),
    "a masked answer": ({"conversations": last(talk("a", "b"), masked=True)}, "not_for_training", "'masked': True"),
    "two systems": ({"system": "Be long.", "messages": [BRIEF, *chat("Hi", "Ho")]}, "bad_row", "another text in 'system'"),
    "two talks": ({**LOOK, "messages": chat("Hi", "Ho")}, "bad_row", "'messages' and 'conversations' are both there and differ"),
    "a preference": ({"prompt": "Hi", "completion": None, "chosen": "a", "rejected": "b"}, "bad_row", "a preference pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPPED)
def test_rows_that_are_skipped(tmp_path: Path, case: str) -> None:
    row, reason, says = SKIPPED[case]
    assert reason in SKIP_REASONS
    for name, made in read(tmp_path, row | {"id": "i"}).items():
        assert isinstance(made, SkipRecord), (name, made)
        assert (made.reason, made.source_id) == (reason, "i"), (name, made)
        assert says in made.detail, (name, made.detail)


NOTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "tools": (asked("Hi", tools="[]"), "columns_unused", "'tools'"),
    "tools as a list": ({"messages": chat("Hi", "Ho"), "tools": [{"name": "f"}]}, "columns_unused", "'tools'"),
    "reasoning": ({"messages": last(chat("Hi", "Ho"), reasoning_content="so")}, "columns_unused", "'reasoning_content' of a turn"),
    "a flag": ({"messages": last(chat("Hi", "Ho"), learn=False)}, "columns_unused", "'learn' of a turn"),
    "system_prompt": (asked("Hi", system_prompt="Be brief."), "columns_unused", "'system_prompt'"),
    "name": ({"messages": last(chat("Hi", "Ho"), name="Ann")}, "columns_unused", "'name' of a turn"),
    "a weight": ({"messages": last(chat("Hi", "Ho"), weight=0.5)}, "columns_unused", "'weight' of a turn"),
    "weight of the row": (asked("Hi", weight=2), "columns_unused", "'weight'"),
    "chosen beside messages": ({"messages": chat("Hi", "Ho"), "chosen": "Ho", "rejected": "Hu"}, "columns_unused", "'chosen', 'rejected'"),
    "an image in an answer": ({"image": "a.png", "conversations": talk("Which tag?", "<image> it is")}, "image_in_answer", "turn 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_rows_that_are_read_with_a_note(tmp_path: Path, case: str) -> None:
    row, kind, seen = NOTED[case]
    assert kind in ROW_NOTES
    for name, made in read(tmp_path, row).items():
        assert isinstance(made, Sample), (name, made)
        assert made.notes == ((kind, seen),), name


KEYS = {
    "000000000-d7237762": LOOK,
    "000000000-2734c128": {"image": ["a.png", "b.png"], "conversations": talk("<image><image>", "x", "y ä", "z")},
    "000000000-c177907a": {"messages": [{"role": "system", "content": "s"}, *chat("Hi", "Ho")]},
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_those_of_the_first_readers(tmp_path: Path, key: str) -> None:
    """A capture goes on where an older one stopped, and its rows are found by their keys."""
    for name, made in read(tmp_path, KEYS[key]).items():
        assert isinstance(made, Sample) and row_key(made) == key, name
