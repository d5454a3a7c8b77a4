"""The choice, written into an existing kd.toml: only those keys change, comments and order stay; checked by parsing before it is kept."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teacher_cache.errors import DiskError, KdcliError
from teacher_cache.whole_file import write_whole

Tables = Mapping[str, Mapping[str, Any]]
"""Table name (``capture``, ``fields.vision_topk``) → key → value; None removes the key."""
SKETCH_ONLY = ("step", "codec_version")


def tables_of(store: str, calibration: str, params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What kd.toml has to say. params: field → chosen parameters."""
    found: dict[str, dict[str, Any]] = {"capture": {"store": store, "calibration": calibration}}
    for name, values in params.items():
        # Another codec leaves nothing behind of the one before.
        gone = {key: None for key in SKETCH_ONLY if "codec" in values and key not in values}
        found[f"fields.{name}"] = {**gone, **values}
    return found


def block(tables: Tables) -> str:
    """TOML to paste."""
    texts = []
    for name, values in tables.items():
        lines = [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
        texts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(texts) + "\n"


def toml_value(value: Any) -> str:
    """A text, number or boolean; JSON's notation of these is TOML's too."""
    if not isinstance(value, str | int | float | bool):
        raise KdcliError(f"kd.toml: cannot write {value!r}")
    return json.dumps(value, ensure_ascii=False)


def edited(text: str, tables: Tables) -> str:
    """``text`` with these keys; KdcliError where it is written in a way that line edits do not reach."""
    new = text
    for name, values in tables.items():
        new = edit_table(new, name, values)
    wanted = tomllib.loads(text)
    for name, values in tables.items():
        at: dict[str, Any] = wanted
        for step in name.split("."):
            at = at.setdefault(step, {})
        for key, value in values.items():
            at.pop(key, None)
            if value is not None:
                at[key] = value
    try:
        same = without_empty(tomllib.loads(new)) == without_empty(wanted)
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise KdcliError("its tables are not written as [capture] and [fields.NAME] with one key per line")
    return new


def without_empty(value: Any) -> Any:
    """A table that holds nothing says nothing."""
    if not isinstance(value, dict):
        return value
    kept = {key: without_empty(one) for key, one in value.items()}
    return {key: one for key, one in kept.items() if one != {}}


def edit_table(text: str, name: str, values: Mapping[str, Any]) -> str:
    lines = text.split("\n")
    header = re.compile(rf"^\s*\[\s*{re.escape(name)}\s*\]\s*(#.*)?$")
    start = next((number for number, line in enumerate(lines) if header.match(line)), None)
    if start is None:
        present = {key: value for key, value in values.items() if value is not None}
        return text.rstrip("\n") + "\n\n" + block({name: present}) if present else text
    stop = next((n for n in range(start + 1, len(lines)) if re.match(r"^\s*\[", lines[n])), len(lines))
    body = lines[start + 1 : stop]
    for key, value in values.items():
        body = edit_key(body, key, value)
    return "\n".join([*lines[: start + 1], *body, *lines[stop:]])


def edit_key(body: list[str], key: str, value: Any) -> list[str]:
    """One key of a table's lines: replaced where it stands, its comment kept; else put after the last key."""
    pattern = re.compile(rf"^(\s*{re.escape(key)}\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s#]+)(\s*#.*)?\s*$")
    at = next((number for number, line in enumerate(body) if pattern.match(line)), None)
    if value is None:
        return body if at is None else [*body[:at], *body[at + 1 :]]
    if at is None:
        keys = [number for number, line in enumerate(body) if re.match(r"^\s*[A-Za-z_]\w*\s*=", line)]
        place = keys[-1] + 1 if keys else 0
        return [*body[:place], f"{key} = {toml_value(value)}", *body[place:]]
    match = pattern.match(body[at])
    assert match is not None
    before = match[2]
    after = toml_value(value)
    comment = match[3] or ""
    if comment:  # its column stays where it can
        spaces = len(comment) - len(comment.lstrip())
        comment = " " * max(1, spaces + len(before) - len(after)) + comment.lstrip()
    return [*body[:at], f"{match[1]}{after}{comment}", *body[at + 1 :]]


def write(path: Path | None, tables: Tables) -> dict[str, Any]:
    """Edit the file in one step, or say what to paste: ``{"written", "path", "diff", "block", "why"}``."""
    body: dict[str, Any] = {"written": False, "path": str(path), "diff": "", "block": block(tables), "why": ""}
    if path is None or not path.is_file():
        return body | {"why": "put this into kd.toml (`kdcli init` writes one)"}
    text = path.read_text()
    try:
        new = edited(text, tables)
    except KdcliError as error:
        return body | {"why": f"{path} was left as it is ({error}); put this into it by hand"}
    diff = difflib.unified_diff(text.splitlines(), new.splitlines(), str(path), f"{path}, now", lineterm="", n=1)
    if new != text:
        try:
            write_whole(path, new)
        except DiskError as error:  # what was measured is worth hours, and is still to be told
            return body | {"why": f"{error}; or put this into it by hand"}
    return body | {"written": True, "diff": "\n".join(diff)}
