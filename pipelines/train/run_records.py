"""The documents that runs, evaluations and ablations leave, read back: what stands there fits, or one line says which file does not.

Anybody can have edited one, a disk can have damaged it, and something else can stand in its place. Of a number that is none (NaN, which
Python writes and JSON does not know) nothing is known: it is read as null.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from teacher_cache.errors import KdcliError, one_line
from teacher_cache.shards.schema import COUNT, MOST, misfit
from teacher_cache.whole_file import write_whole

MOST_BYTES = 64 << 20
"""Of one document. The largest that is written is an ablation's ``results.json``, which nobody reads back."""
MOST_LINE = 1 << 20
"""Bytes of one line of ``metrics.jsonl``."""
MOST_DEPTH = 64
MOST_STEPS = 10**12
LARGEST = 1e30
"""Scores beyond are damage: squares of them overflow."""
LARGEST_LOSS = 1e290
"""Losses beyond are endless: sums of them would overflow."""

Check = Callable[[Any], str]
"""What is wrong with a document, in words; "" for nothing."""

STAGE_NAME = re.compile(r"[\w+-]{1,80}")
"""What a stage, and its folder, can be called: no path."""
STAGE = {
    "stage": str,
    "folder?": str,
    "method?": str,
    "knobs?": dict,
    "parts?": [str],
    "templates?": {...: str},
    "fields?": {...: [str]},
    "settings?": dict,
    "compressor?": (dict, None),
}
RUN = {
    "cache?": str,
    "plan_hash?": str,
    "stages?": [STAGE],
    "versions?": {...: str},
    "git?": (str, None),
}
"""``run.json``."""
DONE = {"result?": {"steps?": COUNT, "samples?": (COUNT, None)}}
"""What is shown of ``done.json``."""
TRAIN_AGAIN = "restore it, or run the same `kdcli train-student` again, which writes it again"
ASK_AGAIN = "write it again with `kdcli eval --out`, or remove it"


def read_record(path: Path, check: Check, fix: str) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        KdcliError: it is no plain file, no JSON object, or ``check`` says so; names the file and ``fix``.
    """
    return parse_record(read_plain(path, fix), str(path), check, fix)


def parse_record(data: bytes, place: str, check: Check, fix: str) -> dict[str, Any]:
    """The same of bytes that were read already."""
    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=lambda name: None)
        wrong = misfit(body, {}) or odd(body) or check(body)
    except (ValueError, RecursionError) as error:
        wrong = f"not JSON ({one_line(error)[:200]})"
    if wrong:
        raise KdcliError(f"{place}: {wrong}: {fix}")
    return body


def write_record(path: Path, body: Any) -> None:
    """A document whole, indented; DiskError where it cannot be written."""
    write_whole(path, json.dumps(finite(body), indent=1) + "\n")


def finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not know: null."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fits(shape: Any) -> Check:
    """A check of ``schema``'s kinds."""
    return lambda body: misfit(body, shape)


def read_plain(path: Path, fix: str) -> bytes:
    """A whole small file; KdcliError where it cannot be read."""
    with open_plain(path, fix) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MOST_BYTES:
            raise KdcliError(f"{path}: it has {size:,} bytes, {MOST_BYTES:,} are read at most: {fix}")
        return opened.read(MOST_BYTES)


@contextmanager
def open_plain(path: Path, fix: str) -> Iterator[BinaryIO]:
    """A file to read; KdcliError where it cannot be, or is a folder, a pipe or a device, which would be waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise KdcliError(f"{path}: it is not a file: {fix}")
            with os.fdopen(handle, "rb", closefd=False) as opened:
                yield opened
        finally:
            os.close(handle)
    except OSError as error:
        raise KdcliError(f"{path}: cannot be read ({error.strerror}): {fix}") from None


def odd(body: Any) -> str:
    """What no document of ours holds, wherever it stands in it: numbers beyond all measure, half characters, endless nesting."""
    left: list[tuple[Any, str, int]] = [(body, "it", 0)]
    while left:
        value, name, depth = left.pop()
        wrong = _odd_one(value, name)
        if isinstance(value, Mapping | list):
            wrong = wrong or (f"{name} is nested more than {MOST_DEPTH} deep" if depth == MOST_DEPTH else "")
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += [(one, f"{name}.{key}"[-80:], depth + 1) for key, one in pairs]
        if wrong:
            return wrong
    return ""


def _odd_one(value: Any, name: str) -> str:
    if isinstance(value, Mapping):
        return next(filter(None, (misfit(key, str, f"a key of {name}") for key in value)), "")
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{name} must be a finite number"
    if isinstance(value, int):
        return "" if abs(value) < MOST else f"{name} is too large a number"
    return misfit(value, str, name) if isinstance(value, str) else ""


def read_run_card(path: Path) -> dict[str, Any]:
    """``run.json``; names of stages are names of folders."""
    return read_record(path, misfit_of_run, TRAIN_AGAIN)


def misfit_of_run(body: Any) -> str:
    if wrong := misfit(body, RUN):
        return wrong
    names = [one[key] for one in body.get("stages", []) for key in ("stage", "folder") if key in one]
    return next(
        (f"stage {name[:80]!r} is not the name of a stage" for name in names if not STAGE_NAME.fullmatch(name)), ""
    )


_SCORE = (float, None)
_FAMILY = {"n?": COUNT, "exact_match": float, "tokens?": COUNT, "nll?": _SCORE}
_RESULT = {
    "n?": COUNT,
    "rows?": COUNT,
    "exact_match": float,
    "family_mean": float,
    "nll?": _SCORE,
    "nll_family_mean?": _SCORE,
    "ece?": _SCORE,
    "skipped?": {...: COUNT},
    "nll_skipped?": {...: COUNT},
    "families": {...: _FAMILY},
}


def misfit_of_result(body: Any, name: str = "it") -> str:
    """What keeps a value from being the result of one evaluation (``pipelines.judge.evaluation.score``)."""
    if wrong := misfit(body, _RESULT, name):
        return wrong
    means = [key for key in body if key.endswith("_family_mean")]
    read = {key: body[key] for key in (*means, *(one.removesuffix("_family_mean") for one in means)) if key in body}
    columns = {f"families.{family}.{key}": one for family, row in body["families"].items() for key, one in row.items()}
    for key, value in {
        **read,
        "exact_match": body["exact_match"],
        "family_mean": body["family_mean"],
        **columns,
    }.items():
        if misfit(value, _SCORE) or (value is not None and abs(value) > LARGEST):
            return f"{name}.{key} must be a number, or null".removeprefix("it.")
    return ""


def misfit_of_scores(body: Any) -> str:
    """The same of ``scores.json``: one result, or results by name, or a list of them by name, one a seed."""
    if wrong := misfit(body, {}):
        return wrong
    if "families" in body:
        return misfit_of_result(body)
    for name, value in body.items():
        if value == []:
            return f"the result {name[:80]!r} is an empty list"
        for one in value if isinstance(value, list) else [value]:
            if wrong := misfit_of_result(one, f"the result {name[:80]!r}"):
                return wrong
    return ""


def read_scores(path: Path) -> dict[str, Any]:
    """``scores.json``."""
    return read_record(path, misfit_of_scores, ASK_AGAIN)


def read_points(path: Path) -> list[dict[str, float]]:
    """The logged steps of ``metrics.jsonl``, in order. A last line that was cut is none yet: the run may be going on, or was killed.

    Raises:
        KdcliError: names the file and the line that is damaged.
    """
    fix = "remove that line, or the stage's folder to train it again"
    points: dict[float, dict[str, float]] = {}
    with open_plain(path, fix) as log:
        for number, line in enumerate(iter(lambda: log.readline(MOST_LINE), b""), start=1):
            point = _point(line)
            if isinstance(point, str):
                if line.endswith(b"\n") or len(line) == MOST_LINE:
                    raise KdcliError(f"{path}: line {number} is damaged ({point}): {fix}")
            else:
                points[point["step"]] = point
    return [points[step] for step in sorted(points)]


def _point(line: bytes) -> dict[str, float] | str:
    """The numbers of a line by name, or what is wrong with it. Losses of a run that diverged are no numbers, or endless."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {one_line(error)[:200]}"
    if wrong := misfit(body, {"step": COUNT}) or next(filter(None, (misfit(key, str, "a key") for key in body)), ""):
        return wrong
    if body["step"] > MOST_STEPS:
        return "step is too large a number"
    numbers = {key: value for key, value in body.items() if type(value) in (int, float)}
    return {key: float(value) if abs(value) < LARGEST_LOSS else math.inf for key, value in numbers.items()}
