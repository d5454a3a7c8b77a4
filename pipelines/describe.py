"""What a capture says of itself before any worker starts: ``field.json`` of every field, and the ``teacher/`` folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.fields import Field
from teacher_cache.plan import Plan, content_hash, difference
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage

HEAD = "head.safetensors"


def describe(
    storage: Storage,
    plan: Plan,
    fields: Mapping[str, Field],
    fingerprint: dict[str, Any],
    processor: Any,
    load_head: Callable[[], torch.Tensor],
) -> dict[str, str]:
    """Write them, or check that those there are the same. Returns field → sha256 of its ``field.json``.

    Args:
        load_head: the teacher's head W ``[V, D]``, asked for only where a field needs it and the cache has it not.
    """
    folder = f"teacher/{content_hash(fingerprint)[:12]}"
    with_head = [name for name, one in fields.items() if any(want.startswith("hidden.") for want in one.wants)]
    bodies = {
        name: {
            "field": name,
            "version": one.version,
            "params": dict(one.params),
            "plan_hash": plan.plan_hash,
            "teacher": fingerprint,
            "teacher_folder": folder,
        }
        for name, one in fields.items()
    }
    for name, body in bodies.items():
        refuse_other_settings(storage, name, body)
    if fields:
        write_processor(storage, folder, processor)
    head_sha = write_head(storage, folder, load_head) if with_head else None
    hashes = {}
    for name, body in bodies.items():
        data = seal({**body, "head_sha256": head_sha if name in with_head else None})
        if not storage.put_new(f"fields/{name}/field.json", data):
            refuse_other_settings(storage, name, body)
        hashes[name] = hashlib.sha256(storage.read(f"fields/{name}/field.json")).hexdigest()
    return hashes


def refuse_other_settings(storage: Storage, name: str, body: Mapping[str, Any]) -> None:
    """CacheError with a diff where the cache has this field with other settings or by another teacher."""
    path = f"fields/{name}/field.json"
    if not storage.exists(path):
        return
    there = unseal(storage.read(path), f"{storage}/{path}")
    there.pop("head_sha256", None)  # of the same weights, by their hash in the fingerprint
    if there != body:
        lines = "; ".join(difference(there, body))
        raise CacheError(f"{storage}: field {name} was made with other settings: {lines}: choose another --out")


def write_head(storage: Storage, folder: str, load_head: Callable[[], torch.Tensor]) -> str:
    """The teacher's head W, for fields of hidden states. Returns its file's sha256; ``head.json`` says it is complete."""
    receipt = f"{folder}/head.json"
    if storage.exists(receipt):
        return unseal(storage.read(receipt), f"{storage}/{receipt}")["head_sha256"]
    data = container.pack({"weight": load_head().cpu()})
    digest = hashlib.sha256(data).hexdigest()
    storage.put_bytes(data, f"{folder}/{HEAD}")
    storage.put_new(receipt, seal({"head_sha256": digest}))
    return digest


def write_processor(storage: Storage, folder: str, processor: Any) -> None:
    """Tokenizer, chat template and image settings of the teacher; ``processor.json`` lists them when all are there."""
    receipt = f"{folder}/processor.json"
    if storage.exists(receipt):
        return
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        files = {file.name: file.read_bytes() for file in sorted(Path(saved).iterdir())}
    for name, data in files.items():
        storage.put_bytes(data, f"{folder}/processor/{name}")
    storage.put_new(receipt, seal({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))
