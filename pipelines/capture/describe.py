"""What a capture says of itself before any worker starts: ``field.json`` of every field, and the ``teacher/`` folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.fields import CalibratedField, Field, create_field, described_params
from teacher_cache.fields.calibration import Calibration
from teacher_cache.planning.plan import Plan, content_hash, difference
from teacher_cache.reading.cache import read_field
from teacher_cache.reading.verify import CALIBRATION_ROLES
from teacher_cache.shards.schema import require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage

HEAD = "head.safetensors"
LOST = "`kdcli cache repair`, with the flags of the capture, makes it again, or names the command that does"


def describe(
    storage: Storage,
    plan: Plan,
    fields: Mapping[str, Field],
    fingerprint: dict[str, Any],
    processor: Any,
    load_head: Callable[[], torch.Tensor],
    calibrate: Callable[[Mapping[str, CalibratedField]], Mapping[str, Calibration]],
) -> tuple[dict[str, str], dict[str, Field]]:
    """Write them, or check that those there are the same.

    Args:
        load_head: the teacher's head W ``[V, D]``, asked for only where a field needs it and the cache has it not.
        calibrate: fits the fields that are new to the cache and need it; asked once, for all of them.
    Returns:
        field → sha256 of its ``field.json``; field → the field, bound to its calibration.
    """
    folder = f"teacher/{content_hash(fingerprint)[:12]}"
    bodies = {name: field_body(name, one, plan, fingerprint, folder) for name, one in fields.items()}
    for name, body in bodies.items():
        refuse_other_settings(storage, name, body)
    if fields:
        write_processor(storage, folder, processor)
    with_head = [name for name, one in fields.items() if reads_with_head(one)]
    head_sha = write_head(storage, folder, load_head, heads_named(storage, with_head)) if with_head else None
    new = new_calibrated(storage, fields)
    fitted = calibrate(new) if new else {}
    for name, body in bodies.items():
        if storage.exists(field_path(name)):
            continue
        files = write_calibration(storage, folder, name, fitted[name]) if name in fitted else {}
        data = seal({**body, "head_sha256": head_sha if name in with_head else None, **files})
        if not storage.put_new(field_path(name), data):
            refuse_other_settings(storage, name, body)  # another writer was first: its calibration is the cache's
    if lost := lost_files(storage, fields):
        raise CacheError(f"{storage}/{lost[0]} is lost: {LOST}")
    hashes = {name: hashlib.sha256(storage.read(field_path(name))).hexdigest() for name in fields}
    return hashes, {name: bound(storage, name, one) for name, one in fields.items()}


def heads_named(storage: Storage, names: Iterable[str]) -> set[str]:
    """sha256 of the heads that these fields, where they are there, are read with."""
    there = (name for name in names if storage.exists(field_path(name)))
    bodies = (unseal(storage.read(field_path(name)), f"{storage}/{field_path(name)}") for name in there)
    return {body["head_sha256"] for body in bodies if body.get("head_sha256")}


def new_calibrated(storage: Storage, fields: Mapping[str, Field]) -> dict[str, CalibratedField]:
    """Those that need a calibration and that the cache has not described yet."""
    new = {name: one for name, one in fields.items() if one.calibrated and not storage.exists(field_path(name))}
    return cast(dict[str, CalibratedField], new)


def field_path(name: str) -> str:
    return f"fields/{name}/field.json"


def field_body(name: str, one: Field, plan: Plan, fingerprint: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What two captures must agree on to write the same field."""
    return {
        "field": name,
        "version": one.version,
        "params": dict(one.params),
        "temperatures": list(one.temperatures) if one.temperatures is not None else None,
        "plan_hash": plan.plan_hash,
        "teacher": fingerprint,
        "teacher_folder": folder,
    }


def reads_with_head(one: Field) -> bool:
    """Stored hidden states are read with the teacher's whole head; sketches and cosines are not."""
    return one.name.endswith("_hidden") and not one.calibrated


def write_calibration(storage: Storage, folder: str, name: str, fitted: Calibration) -> dict[str, Any]:
    """The calibration's files, named by their content. Returns what ``field.json`` says of them."""
    described: dict[str, Any] = {}
    for role, (file, data) in calibration_files(folder, name, fitted).items():
        storage.put_bytes(data, file["path"])
        described[role] = file
    return described


def calibration_files(folder: str, name: str, fitted: Calibration) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Role → (what ``field.json`` says of its file, the file's content)."""
    files = {}
    for role, tensors in (("calibration", fitted.tensors), ("low_rank_head", fitted.low_rank_head)):
        if tensors:
            data = container.pack(tensors)
            digest = hashlib.sha256(data).hexdigest()
            path = f"{folder}/calibration/{name}-{role}-{digest[:12]}.safetensors"
            files[role] = ({"path": path, "sha256": digest, "rows": fitted.rows}, data)
    return files


def bound(storage: Storage, name: str, one: Field) -> Field:
    """The field with the calibration that the cache has committed."""
    if not one.calibrated:
        return one
    body = unseal(storage.read(field_path(name)), f"{storage}/{field_path(name)}")
    return read_field(storage, name, body)


OF_A_VERSION = ("codec_version", "text", "step", "long_step")
"""Parameters that came, or got another default, with a version: of the codec, which is the first of them, or of the field."""


def as_begun(storage: Storage, fields: Mapping[str, Field], asked: Mapping[str, Mapping[str, Any]]) -> dict[str, Field]:
    """The same fields, each with the codec version that the cache has begun it with: a newer program goes on as the older one did.

    Args:
        asked: field → parameters that were given; a version among them stays.
    """
    settled = dict(fields)
    for name, one in fields.items():
        path = field_path(name)
        if not {*OF_A_VERSION} & {*one.params} or not storage.exists(path):
            continue
        body = unseal(storage.read(path), f"{storage}/{path}")
        if not isinstance(body.get("params"), dict) or not isinstance(body.get("version"), int):
            continue
        changed = OF_A_VERSION if body["version"] < one.version else OF_A_VERSION[:1]
        newer = [key for key in changed if key in one.params and key not in asked[name]]
        there = described_params(name, body["version"], body["params"])
        if there == {
            key: there[key] if key in newer else value
            for key, value in one.params.items()
            if key not in newer or key in there
        }:
            settled[name] = create_field(name, there)
    return settled


def refuse_other_settings(storage: Storage, name: str, body: Mapping[str, Any]) -> None:
    """CacheError with a diff where the cache has this field with other settings or by another teacher."""
    path = field_path(name)
    if not storage.exists(path):
        return
    there = unseal(storage.read(path), f"{storage}/{path}")
    there = {key: value for key, value in there.items() if key in body}  # its files are the cache's own business
    if there != body:
        lines = "; ".join(difference(there, body))
        raise CacheError(f"{storage}: field {name} was made with other settings: {lines}: choose another --out")


def write_head(
    storage: Storage, folder: str, load_head: Callable[[], torch.Tensor], named: Collection[str] = ()
) -> str:
    """The teacher's head W, for fields of hidden states. Returns its file's sha256; ``head.json`` says it is complete.

    Args:
        named: what existing fields read it by. A file that is gone is written again where it comes out as it was.

    Raises:
        CacheError: it comes out otherwise.
    """
    path, receipt = f"{folder}/{HEAD}", f"{folder}/head.json"
    said = (
        {unseal(storage.read(receipt), f"{storage}/{receipt}").get("head_sha256")} if storage.exists(receipt) else set()
    )
    promised = said | set(named)
    if said and len(promised) == 1 and is_whole(storage, path):
        return str(promised.pop())
    data = container.pack({"weight": load_head().cpu()})
    digest = hashlib.sha256(data).hexdigest()
    if promised - {digest}:
        raise CacheError(f"{storage}/{path} is lost, and the teacher's head is another one here: {LOST}")
    storage.put_bytes(data, path)
    storage.put_new(receipt, seal({"head_sha256": digest}))
    return digest


def write_processor(storage: Storage, folder: str, processor: Any) -> None:
    """Tokenizer, chat template and image settings of the teacher; ``processor.json`` lists them when all are there.

    A file that is gone is written again where it comes out as it was; CacheError where it does not.
    """
    receipt = f"{folder}/processor.json"
    if not storage.exists(receipt):
        files = processor_files(processor)
        for name, data in files.items():
            storage.put_bytes(data, f"{folder}/processor/{name}")
        storage.put_new(receipt, processor_receipt(files))
        return
    promised = require(unseal(storage.read(receipt), f"{storage}/{receipt}"), {...: str}, f"{storage}/{receipt}")
    there = storage.sizes(f"{folder}/processor", promised)
    lost = [name for name in promised if not there.get(name)]
    files = processor_files(processor) if lost else {}
    for name in lost:
        path = f"{folder}/processor/{name}"
        if name not in files or hashlib.sha256(files[name]).hexdigest() != promised[name]:
            raise CacheError(f"{storage}/{path} is lost, and becomes another file here: {LOST}")
        storage.put_bytes(files[name], path)


def is_whole(storage: Storage, path: str) -> bool:
    """Whether a file of tensors is there and as long as it says of itself; nothing is hashed."""
    try:
        size = storage.size(path)
        return size > 0 and size == container.said_bytes(storage.head(path, container.MOST_HEADER))
    except (FileNotFoundError, CacheError):
        return False


def lost_files(storage: Storage, names: Iterable[str]) -> list[str]:
    """Files that these fields are read with and that are not there, or cut off; only receipts are looked into.

    Raises:
        CacheError: a description or a receipt is damaged.
    """
    found: list[str] = []
    bodies = [unseal(storage.read(field_path(name)), f"{storage}/{field_path(name)}") for name in names]
    for body in bodies:
        folder, head = body["teacher_folder"], body.get("head_sha256")
        files = [body[role]["path"] for role in CALIBRATION_ROLES if body.get(role)]
        files += [f"{folder}/{HEAD}"] if head else []
        found += [path for path in files if not is_whole(storage, path)]
        if head and said_of(storage, f"{folder}/head.json") != {"head_sha256": head}:
            found.append(f"{folder}/head.json")
    for folder in dict.fromkeys(body["teacher_folder"] for body in bodies):  # most often one
        promised = said_of(storage, f"{folder}/processor.json")
        there = storage.sizes(f"{folder}/processor", promised or ())
        found += [f"{folder}/processor.json"] if promised is None else []
        found += [f"{folder}/processor/{one}" for one in promised or () if not there.get(one)]
    return list(dict.fromkeys(found))


def said_of(storage: Storage, path: str) -> dict[str, Any] | None:
    """What a receipt says; None where it is not there, CacheError where it is damaged."""
    return unseal(storage.read(path), f"{storage}/{path}") if storage.exists(path) else None


def processor_files(processor: Any) -> dict[str, bytes]:
    """What the library saves of it, by name."""
    with tempfile.TemporaryDirectory() as saved:
        processor.save_pretrained(saved)
        return {file.name: file.read_bytes() for file in sorted(Path(saved).iterdir())}


def processor_receipt(files: Mapping[str, bytes]) -> bytes:
    return seal({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
