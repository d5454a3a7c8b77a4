"""What flags and kd.toml say together: mixture, teacher, student, cache, fields, knobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EACH_PART = ("part", "image_root", "follow_links", "template", "limit")
"""What ``data_options`` gives beside ``--data``."""
RUN_BY = ("dtype", "device", "backend", "vllm_route")
"""Flags that say how a teacher runs."""

BUDGET = ("fidelity", "bytes_per_token", "max_kl")


def take(flags: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These flags, taken out of the others."""
    return {name: flags.pop(name) for name in names}


def load(config: str | None) -> Any:
    """The settings of a kd.toml; of the one in this folder where none is named."""
    from pipelines.settings import load_settings

    return load_settings(Path(config) if config else None)


def need(given: dict[str, Any]) -> None:
    """KdcliError naming the first flag that neither the command line nor kd.toml gave."""
    from teacher_cache.errors import KdcliError

    for name, value in given.items():
        if not value:
            raise KdcliError(f"no {name}: give the flag, or run `kdcli init` and edit kd.toml")


def data_specs(data: tuple[str, ...], follow_links: bool | None = None, **each: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flags → one DataSpec a part; an option is given once for all parts or once for each, ``follow_links`` for all."""
    from pipelines.settings import build
    from teacher_cache.errors import KdcliError
    from teacher_cache.sources import DataSpec

    specs = []
    for i, path in enumerate(data):
        values: dict[str, Any] = {"path": path, "follow_links": bool(follow_links)}
        for name, given in each.items():
            if given and len(given) not in (1, len(data)):
                raise KdcliError(
                    f"--{name.replace('_', '-')} was given {len(given)} times for {len(data)} --data: give it once, or once per --data"
                )
            if given:
                values[name] = given[i if len(given) > 1 else 0]
        # The names that the training stages read: captions are plain, everything else is instruction tuning.
        values.setdefault("part", "caption" if values.get("template") == "plain" else "sft")
        specs.append(build(DataSpec, values, f"--data {path}"))
    return tuple(specs)


def teacher_spec(teacher: str | None, known: Any, trust_remote_code: bool | None, **flags: Any) -> Any:
    """The teacher of a command: ``--teacher``, else that of kd.toml, whose trust does not go over to another model; None: neither."""
    from pipelines.settings import override
    from teacher_cache.teachers.transformers import TeacherSpec

    spec = TeacherSpec(teacher) if teacher else known
    return override(spec, trust_remote_code=trust_remote_code, **flags) if spec else None


def train_settings(known: Any, student: str | None, trust_remote_code: bool | None, **flags: Any) -> Any:
    """``[train]`` with what the flags say; trust in the student of kd.toml does not go over to another one."""
    from pipelines.settings import override

    if student and student != known.student:
        trust_remote_code = bool(trust_remote_code)
    return override(known, student=student, trust_remote_code=trust_remote_code, **flags)


def of_terms(known: Any, **flags: tuple[str, ...]) -> Any:
    """``[train]`` with what ``--schedule`` and ``--select`` say of single terms (TERM=TEXT), over what it says of them."""
    from pipelines.settings import override
    from teacher_cache.errors import KdcliError

    for name, given in flags.items():
        told = dict(getattr(known, name) or {})
        for one in given:
            term, equals, text = one.partition("=")
            if not (equals and term and text):
                raise KdcliError(f"--{name} {one}: write TERM=TEXT, with a loss term of the method (docs/train.md)")
            told[term] = text
        known = override(known, **{name: told or None})
    return known


def parse_knobs(knobs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it parses as such, else text."""
    from teacher_cache.errors import KdcliError

    parsed: dict[str, Any] = {}
    for knob in knobs:
        name, equals, value = knob.partition("=")
        if not equals:
            raise KdcliError(f"--set {knob}: write NAME=VALUE, e.g. --set gamma=1.0")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
        except (ValueError, RecursionError) as error:
            raise KdcliError(f"--set {name}=…: {error}") from None
    return parsed


def split(text: str | None) -> tuple[str, ...] | None:
    """Comma-separated names; None where the flag was not given."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text is not None else None


def field_params(settings: Any, capture: Any, k: int | None, codec: str | None) -> dict[str, dict[str, Any]]:
    """``[fields.NAME]`` of kd.toml for the captured fields, with ``--k`` and ``--codec`` over it."""
    from pipelines.capture.profiles import chosen_fields

    captured = chosen_fields(capture.store, capture.fields, {})
    params = {name: dict(value) for name, value in settings.fields.items() if name in captured}
    for name in captured:
        if k is not None and name.endswith("_topk"):
            params[name] = {**params.get(name, {}), "k": k}
        if codec is not None and name.endswith("_hidden"):
            params[name] = {**params.get(name, {}), "codec": codec}
    return params


def named_cache(url: str | None, config: str | None) -> str:
    """The cache that a command names, else that of kd.toml."""
    from teacher_cache.errors import KdcliError

    url = url or load(config).cache
    if not url:
        raise KdcliError("no cache: name it (`kdcli cache status CACHE`), or run `kdcli init` for a kd.toml")
    return url


def open_cache(url: str | None, config: str | None) -> Any:
    """The same cache, ready to be read."""
    from teacher_cache.reading.cache import TeacherCache

    return TeacherCache(named_cache(url, config))
