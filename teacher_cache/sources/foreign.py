"""Files that no reader takes: what they are, and the command that makes them readable. One line each, before any row is read."""

from __future__ import annotations

import json
import os
import re

from teacher_cache.errors import DataError, printable
from teacher_cache.sources import files

_LOOK_BYTES = 1 << 16
_COMPRESSED = (
    (b"\x1f\x8b", "gunzip"),
    (b"BZh", "bunzip2"),
    (b"\xfd7zXZ", "unxz"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"PK\x03\x04", "unzip"),
)
_OTHERS = (
    (b"ARROW1", "an Arrow file", "write it as parquet (`Dataset.to_parquet`)"),
    (b"\xff\xff\xff\xff", "an Arrow stream, as `save_to_disk` writes it", "write it as parquet (`Dataset.to_parquet`)"),
    (b"version https://git-lfs", "a git-lfs pointer, not the data", "fetch the data (`git lfs pull`)"),
    (b"<!doctype html", "a web page, not data", "fetch the file itself"),
    (b"<html", "a web page, not data", "fetch the file itself"),
)
_WIDE = re.compile(rb"\xff\xfe|\xfe\xff|[\[{]\0[^\0]\0|\0[\[{]\0[^\0]")
"""UTF-16 and UTF-32, with a byte order mark or a bracket as their first character."""
_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*(:?)\s*(\[?)|[\[{]|[\]}]', re.DOTALL)


def refuse_foreign(path: str) -> None:
    """
    Raises:
        DataError: the file is compressed, of another encoding, or something else that is known by its first bytes.
    """
    start = files.first_bytes(path, 64)
    if _WIDE.match(start) or start[:4] == b"\0\0\xfe\xff":
        to = f"{os.path.splitext(path)[0]}-utf8{os.path.splitext(path)[1]}"
        kind = "UTF-32" if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else "UTF-16"
        raise DataError(f"{path}: the file is {kind}; save it as UTF-8 (`iconv -f {kind} -t UTF-8 {path} > {to}`)")
    for magic, program in _COMPRESSED:
        if start.startswith(magic):
            raise DataError(f"{path} is compressed, and rows are found by seeking: unpack it first ({program})")
    for magic, what, mend in _OTHERS:
        if start.lower().startswith(magic.lower()):
            raise DataError(f"{path} is {what}: {mend}")


def described(path: str) -> str:
    """What a file that no format fits seems to be, with the fix; empty: nothing is known."""
    start = files.first_bytes(path, _LOOK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] != b"{":
        return ""
    keys = _top_keys(start)
    names = ", ".join(printable(repr(name[:40])) for name in list(keys)[:8])
    line, newline, rest = start.partition(b"\n")
    is_line = not newline or _is_row(line)
    if keys.keys() & {"messages", "conversations", "prompt", "completion"}:
        if is_line:
            return "it has one JSON object per line: give format messages-jsonl"
        return f"its JSON objects span many lines each; write one per line: `jq -c . {path} > rows.jsonl`"
    if is_line and rest.lstrip()[:1] == b"{":
        return f"it has a JSON object per line, with the keys {names}; a row needs 'conversations', 'messages' or 'prompt' and 'completion'"
    lists = [name for name, is_list in keys.items() if is_list]
    if lists and re.fullmatch(r"\w+", lists[0]):
        return f"it is one JSON object with the keys {names}; write only the list of rows: `jq .{lists[0]} {path} > rows.json`"
    return f"it is one JSON object with the keys {names}; rows are the elements of a JSON list: `jq '[.[]]' {path} > rows.json`"


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _top_keys(start: bytes) -> dict[str, bool]:
    """Keys of the object that ``start`` begins, as far as it reaches: whether a list stands behind each."""
    keys: dict[str, bool] = {}
    depth = 0
    for token in _STRING.finditer(start):
        if token[1] is None:
            depth += 1 if token[0] in b"[{" else -1
            continue
        if depth == 1 and token[2]:
            keys[_text(token[1])] = bool(token[3])
        depth += bool(token[3])
        if depth <= 0:
            break
    return keys


def _text(escaped: bytes) -> str:
    try:
        return str(json.loads(b'"' + escaped + b'"'))
    except ValueError:
        return escaped.decode("utf-8", "replace")
