"""A few rows whose exact hidden states travel with a cache: another machine's teacher must say the same of them before it adds to it.

``teacher/<fingerprint>/canaries.safetensors`` holds, per row i, ``{i}.vision`` and ``{i}.response`` float32 ``[≤ MOST_STATES, D]``;
``canaries.json`` (sealed) its checksum, the rows' keys and token hashes, and how far apart two live runs were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from teacher_cache.capturing.cache_shard import Teacher
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError, CompatibilityError
from teacher_cache.models.head import head_logits
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import Prepared
from teacher_cache.shards.schema import require
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.shards.storage import Storage
from teacher_cache.wants import Wants

FILE, RECEIPT = "canaries.safetensors", "canaries.json"
ROWS, MOST_STATES = 8, 64
KINDS = ("vision", "response")
WANTS = Wants(hidden=set(KINDS))
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 6e-3}
"""Relative RMS of hidden states that another machine may differ by, however quiet the floor was: other kernels sum in another order."""
FLOOR_TIMES = 10
States = dict[str, torch.Tensor]
_RECEIPT = {
    "keys": [[str]],
    "input_ids": [str],
    **dict.fromkeys(("sha256_of_states", "dtype"), str),
    **dict.fromkeys(("floor", "floor_logit"), float),
}


def pick(rows: Sequence[Prepared]) -> list[Prepared]:
    """``ROWS`` of them at even distances."""
    distance = max(1.0, len(rows) / ROWS)
    return [rows[int(i * distance)] for i in range(min(ROWS, len(rows)))]


def states_of(teacher: Teacher, rows: Sequence[Prepared], together: bool = True) -> States:
    """What the teacher says now, float32; ``together``: one batch, else one row at a time."""
    if together:
        outputs = teacher(rows, WANTS)
    else:
        outputs = [one for row in rows for one in teacher([row], WANTS)]
    return {
        f"{i}.{kind}": output.hidden[kind][evenly(len(output.hidden[kind]))].to(torch.float32).contiguous()
        for i, output in enumerate(outputs)
        for kind in KINDS
    }


def evenly(count: int) -> torch.Tensor:
    """Indices of at most ``MOST_STATES`` rows."""
    return torch.arange(count)[:: max(1, -(-count // MOST_STATES))]


def relative_difference(there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> float:
    """RMS of the difference over the RMS of what was stored, all rows together; NaN counts as infinitely far."""
    if {name: one.shape for name, one in there.items()} != {name: one.shape for name, one in here.items()}:
        return float("inf")
    apart = sum(float((there[name].double() - here[name].double()).square().sum()) for name in there)
    norm = sum(float(one.double().square().sum()) for one in there.values())
    found = (apart / norm) ** 0.5 if norm else 0.0
    return found if found == found else float("inf")


def write(
    storage: Storage, folder: str, rows: Sequence[Prepared], teacher: Teacher, head: torch.Tensor, dtype: str
) -> dict[str, Any]:
    """Ask twice (together, one at a time), store the first answer and how far apart the two are. Returns the receipt."""
    chosen = pick(rows)
    together, alone = states_of(teacher, chosen), states_of(teacher, chosen, together=False)
    wide = head.cpu()
    logits = [
        float((head_logits(together[name].to(wide.dtype), wide) - head_logits(one.to(wide.dtype), wide)).abs().max())
        for name, one in alone.items()
        if len(one)
    ]
    data = container.pack(together)
    found = {
        "keys": [[row.part, row.key] for row in chosen],
        "input_ids": [ids_hash(row) for row in chosen],
        "sha256_of_states": hashlib.sha256(data).hexdigest(),
        "floor": relative_difference(together, alone),
        "floor_logit": max(logits, default=0.0),
        "dtype": dtype,
    }
    storage.put_bytes(data, f"{folder}/{FILE}")
    storage.put_new(f"{folder}/{RECEIPT}", seal(found))
    return found


def receipt(storage: Storage, folder: str) -> dict[str, Any] | None:
    """What was noted of the canaries; None where there are none."""
    path = f"{folder}/{RECEIPT}"
    if not storage.exists(path):
        return None
    return require(unseal(storage.read(path), f"{storage}/{path}"), _RECEIPT, f"{storage}/{path}")


def ids_hash(row: Prepared) -> str:
    return hashlib.sha256(row.input_ids.to(torch.int64).numpy().tobytes()).hexdigest()


def check(cache: TeacherCache, folder: str, processor: Any, config: Any, load: Callable[[], Teacher]) -> str:
    """A note of how near this teacher is; CompatibilityError where it is not the one of the preflight.

    Args:
        cache: of the preflight. folder: ``teacher/<fingerprint>`` in it. load: gives the teacher, asked for only where there are canaries.
    """
    there = receipt(cache.storage, folder)
    if there is None:
        return f"{cache.storage} holds no canaries of this teacher: its answers were not compared"
    stored = container.unpack(checked(cache.storage, folder, there), f"{cache.storage}/{folder}/{FILE}")
    preparer = Preparer.like(cache.plan.preparation, processor, config)  # not the job's own limits
    if any(len(one) != 2 for one in there["keys"]) or there["dtype"] not in TOLERANCE:
        raise CacheError(f"{cache.storage}/{folder}/{RECEIPT} is not a list of canaries: run `kdcli preflight` again")
    rows = [find(cache, part, key, preparer) for part, key in there["keys"]]
    other = [row.key for row, digest in zip(rows, there["input_ids"]) if ids_hash(row) != digest]
    if other:
        raise CompatibilityError(
            f"canary row {other[0]} of {cache.storage} has other tokens than at preflight: same tokenizer, template and library?"
        )
    found = relative_difference(stored, states_of(load(), rows))
    limit = max(FLOOR_TIMES * there["floor"], TOLERANCE[there["dtype"]])
    if not found <= limit:
        raise CompatibilityError(
            f"this machine's teacher differs from the preflight's: relative difference {found:.2g} against a noise floor of "
            f"{there['floor']:.2g}, {limit:.2g} is allowed: are weights, dtype, attention and library version the same? Run "
            "`kdcli preflight` here with another --out, or give --calibration '' to fit a new one"
        )
    return f"canaries: {len(rows)} rows answered as at preflight, relative difference {found:.2g} (allowed {limit:.2g})"


def checked(storage: Storage, folder: str, receipt: Mapping[str, Any]) -> bytes:
    """The canary file's bytes; CacheError where it is missing or does not have its checksum."""
    try:
        data = storage.read(f"{folder}/{FILE}")
    except FileNotFoundError:
        raise CacheError(f"{storage}/{folder}/{FILE} is missing: run `kdcli preflight` again") from None
    if hashlib.sha256(data).hexdigest() != receipt["sha256_of_states"]:
        raise CacheError(f"{storage}/{folder}/{FILE} does not have its checksum: run `kdcli preflight` again")
    return data


def find(cache: TeacherCache, part: str, key: str, preparer: Preparer) -> Prepared:
    """A canary row out of the samples column, prepared for this teacher."""
    rows = CachedSamples(cache, [part], [])
    for position, count in enumerate(rows.counts):
        for number in range(count):
            if rows.key(position, number) == key:
                sample = rows.read(position, number).sample
                return preparer.prepare(sample, cache.template(part), cache.image_limits()[part])
    raise CacheError(f"{cache.storage}: its canary row {key} is not among its samples: run `kdcli preflight` again")


def copy(source: Storage, target: Storage, folder: str) -> None:
    """Canaries beside the new cache, which then can be checked the same way."""
    there = receipt(source, folder)
    if there is None or target.exists(f"{folder}/{RECEIPT}"):
        return
    target.put_bytes(checked(source, folder, there), f"{folder}/{FILE}")
    target.put_new(f"{folder}/{RECEIPT}", seal(there))


def restore(source: Storage, target: Storage, folder: str) -> None:
    """The canaries of ``target``, where they are damaged, from the preflight that they came from; CacheError where that has others."""
    there = receipt(source, folder)
    if there is None:
        raise CacheError(f"{source} holds no canaries of this teacher")
    data = checked(source, folder, there)
    with suppress(CacheError):  # a damaged receipt says nothing
        if receipt(target, folder) not in (None, there):
            raise CompatibilityError(f"{source} holds other canaries than {target} had")
    target.put_bytes(data, f"{folder}/{FILE}")
    target.put_bytes(seal(there), f"{folder}/{RECEIPT}")


def problems(storage: Storage, folder: str) -> list[str]:
    """What ``kdcli cache verify`` says of them; a file without a receipt was left by a killed preflight and is none."""
    try:
        there = receipt(storage, folder)
        if there is not None:
            checked(storage, folder, there)
    except CacheError as error:
        return [str(error)]
    return []
