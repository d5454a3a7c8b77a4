"""What a model's JSON files say, looked at before transformers obeys it: sizes, and keys that reach other models and kernels.

A folder or repository is a stranger's. transformers builds what a configuration says (a billion layers too), and some of its keys load
from a hub: attention kernels, backbones, adapters, tokenizers of sound. Where ``--trust-remote-code`` was given those keys are obeyed.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from teacher_cache.errors import KdcliError
from teacher_cache.models.name import check_model_name
from teacher_cache.models.settings import CONFIG, PROCESSING, _check_body

JSON_FILES = (CONFIG, "generation_config.json", *PROCESSING, "tokenizer_config.json")
"""Looked into. Weights and their index are ``weights``' business, tokenizer.json is the tokenizer library's."""
TEXT_FILES = (*JSON_FILES, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
JSON_BYTES = 64 << 20
"""Of one file; tokenizer_config.json of published models has a few MB."""
FILE_BYTES = 1 << 30
"""Of a tokenizer's files."""


def check_model_files(what: str, name: str, revision: str | None = None, trusted: bool = False) -> None:
    """KdcliError of one line where ``name`` is no model, or its files say what no model says or what this run does not obey.

    Args:
        what: names the model in the line, e.g. ``student 'runs/01-SFT/model'``.
        trusted: its program code may run, so its configuration may name any other.
    """
    check_model_name(what, name, revision)
    folder = Path(name)
    if folder.is_dir():
        for one in (*TEXT_FILES, *TEMPLATES):
            _check_plain(folder / one, folder)
    _refuse_adapter(what, name, revision)
    for file in JSON_FILES:
        path: Path | None = folder / file if folder.is_dir() else _of_hub(name, file, revision)
        if path is not None and path.exists():
            try:
                _check_body(what, file, read_json(path), trusted)
            except RecursionError:
                raise KdcliError(
                    f"{path}: nested too deeply: use the file as the model's author published it"
                ) from None


def read_json(path: Path) -> Any:
    """The file's JSON object; KdcliError naming the file where it has none."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise KdcliError(f"{path}: {path.stat().st_size:,} bytes, and at most {JSON_BYTES:,} are read")
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise KdcliError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise KdcliError(
            f"{path}: not readable as JSON ({str(error)[:200]}): download the file again from the model's source"
        ) from None
    if not isinstance(body, dict):
        raise KdcliError(f"{path}: a JSON object is expected, this is a {type(body).__name__}")
    return body


def _check_plain(path: Path, folder: Path) -> None:
    """A file of text is a plain one of this folder: what a link brings in from elsewhere would be copied into caches and students."""
    try:
        found = path.stat()
    except OSError:
        if path.is_symlink():
            raise KdcliError(f"{path}: a link to nothing: put the file there") from None
        return
    if stat.S_ISDIR(found.st_mode) and path.name in TEMPLATES:
        if path.is_symlink():
            raise KdcliError(f"{path}: a link to a folder: put the folder there")
        for one in path.iterdir():
            _check_plain(one, folder)
        return
    if not stat.S_ISREG(found.st_mode):
        raise KdcliError(f"{path}: not a plain file: a model's files are")
    if found.st_size > FILE_BYTES:
        raise KdcliError(f"{path}: {found.st_size:,} bytes, and at most {FILE_BYTES:,} are read")
    if path.is_symlink():
        target, root = path.resolve(), folder.resolve()
        # A snapshot of the hub's cache is made of links to its blobs.
        homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
        if not any(target.is_relative_to(home) for home in homes):
            raise KdcliError(f"{path}: a link that leads out of the model's folder: put a copy of the file there")


def _of_hub(name: str, file: str, revision: str | None) -> Path | None:
    """A file of the hub's model, as transformers fetches and keeps it; None where it has none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # of the hub: what loads the model says it
        return None
    return Path(found) if found else None


def _refuse_adapter(what: str, name: str, revision: str | None) -> None:
    """An adapter beside the weights is loaded where peft is installed, and left out where it is not: never the same model."""
    import importlib.util

    there = (Path(name) / "adapter_config.json").exists()
    if not Path(name).is_dir() and importlib.util.find_spec("peft"):
        there = _of_hub(name, "adapter_config.json", revision) is not None
    if there:
        raise KdcliError(
            f"{what} has an adapter beside its weights (adapter_config.json): merge it (peft: `merge_and_unload`) and save the model"
        )
