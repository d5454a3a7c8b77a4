"""The choice, written into an existing kd.toml: only those keys change, comments and order stay."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

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
    return edited("", tables)


def edited(text: str, tables: Tables) -> str:
    """``text`` with these keys; KdcliError where the edit would say anything else."""
    wanted, new = tomllib.loads(text), text
    try:
        for name, values in tables.items():
            put(wanted, name, values)
            document = tomlkit.parse(new)
            put(document, name, values)
            new = tomlkit.dumps(document)
        same = tomllib.loads(new) == wanted
    except (TOMLKitError, tomllib.TOMLDecodeError, TypeError):  # [capture] is no table
        same = False
    if not same:
        raise KdcliError("its tables are not written as [capture] and [fields.NAME]")
    return new


def put(document: Any, name: str, values: Mapping[str, Any]) -> None:
    """Set, add and remove keys of one table in a parsed file."""
    *above, last = name.split(".")
    for step in above:
        document = document.setdefault(step, {})
    if last not in document:
        document[last] = {key: value for key, value in values.items() if value is not None}
        return
    table = document[last]
    for key, value in values.items():
        if value is None:
            table.pop(key, None)
            continue
        added = key not in table
        table[key] = value
        if added and isinstance(table, Table):
            behind_keys(table)


def behind_keys(table: Table) -> None:
    """Move the key added last up to the others: a comment at a table's end often belongs to the next table."""
    body = table.value.body
    *rest, added = (place for place, (key, _) in enumerate(body) if key is not None)
    if rest:
        body.insert(rest[-1] + 1, body.pop(added))


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
