"""Who says what of every sample: a cache, or a live run of the teacher. Both speak through ``TeacherHeads``, as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from student_train.dataset import TrainBatch
from student_train.needs import Need, Served, serve
from student_train.teacher_view import TeacherHeads, TeacherView
from teacher_cache.capturing.behind import is_finite
from teacher_cache.capturing.cache_shard import Teacher, ask
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.fields.affinity import unit_states
from teacher_cache.planning.plan import difference
from teacher_cache.preparing.batch import Batch
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers.transformers import TeacherSpec, load_processor, teacher_fingerprint
from teacher_cache.wants import ROW_KINDS, Wants

HIDDEN = Wants(hidden=set(ROW_KINDS))
RUN_SETTINGS = ("dtype", "attn_implementation", "backend", "vllm")
"""Parts of a fingerprint that say how a teacher ran, not who it is."""
LIVE = {
    "response_logits": ("response_hidden",),
    "vision_logits": ("vision_hidden",),
    "vision_relation": ("vision_hidden",),
    "vision_raw_logits": ("vision_hidden",),
    "vision_text_affinity": ("affinity",),
}
_NO_BATCH = Batch((), {}, {}, {}, torch.zeros(0, dtype=torch.int64))


class OutputSource:
    """One side's word on every sample.

    Args:
        signals: term → its ``TeacherHeads``. records: per sample, field → decoded record.
    """

    def __init__(self, signals: Mapping[str, TeacherHeads], records: Sequence[Mapping[str, Any]]):
        self.signals, self.records = signals, records

    def view(self, term: str, number: int) -> TeacherView:
        """What this side says of sample ``number`` (a batch of one), as far as ``term`` asks."""
        return self.signals[term].view(TrainBatch(_NO_BATCH, (), {n: [one] for n, one in self.records[number].items()}))


def live_source(
    outputs: Sequence[TeacherOutput], head: torch.Tensor, terms: Mapping[str, frozenset[Need]], device: torch.device
) -> OutputSource:
    """The live teacher's full-vocabulary side: its hidden states, its head W ``[V, D]``, cosines in float32."""
    records = []
    for one in outputs:
        vision, text = unit_states(one)
        # float32, as decoded fields are.
        states = {f"{kind}_hidden": one.hidden[kind].to(torch.float32) for kind in ("response", "vision")}
        records.append({**states, "affinity": vision @ text.T})
    head = head.to(device)
    head = head.to(torch.float32) if device.type == "cpu" else head
    heads = {"response_hidden": head, "vision_hidden": head}
    signals = {}
    for name, needs in terms.items():
        served = Served({need.what: LIVE[need.what] for need in needs}, ())
        signals[name] = TeacherHeads(served, heads, len(head), device)
    return OutputSource(signals, records)


def cache_source(
    cache: TeacherCache, served: Mapping[str, Served], records: Sequence[Mapping[str, Any]], device: torch.device
) -> OutputSource:
    """The cache's side. served: term → the fields that serve it; heads are loaded once for all of them."""
    every = sorted({name for one in served.values() for name in one.names})
    opened = TeacherHeads.open(cache, Served({"all": tuple(every)}, ()), device)
    signals = {name: TeacherHeads(one, opened.heads, opened.vocabulary, device) for name, one in served.items()}
    return OutputSource(signals, records)


def serve_terms(
    cache: TeacherCache, terms: Mapping[str, frozenset[Need]], fields: Sequence[str]
) -> tuple[dict[str, Served], dict[str, Need]]:
    """(term → how the cache serves it, term → the need that it cannot serve)."""
    params = {name: cache.fields[name]["params"] for name in fields}
    served: dict[str, Served] = {}
    unserved: dict[str, Need] = {}
    for name, needs in terms.items():
        for need in sorted(needs):
            try:
                serve([need], params, name, str(cache.storage))
            except CompatibilityError:
                unserved[name] = need
                break
        else:
            served[name] = serve(needs, params, name, str(cache.storage))
    return served, unserved


def teacher_spec(cache: TeacherCache, fields: Sequence[str], teacher: TeacherSpec, dtype: str | None) -> TeacherSpec:
    """The teacher as the capture ran it (dtype, attention), or with the dtype that was asked for; live it runs by transformers."""
    there = cache.fields[fields[0]]["teacher"]
    own = there["backend"] == "transformers"
    attention = there["attn_implementation"] if own else teacher.attn_implementation
    return replace(teacher, dtype=dtype or there["dtype"], attn_implementation=attention, backend="transformers")


def same_teacher(
    cache: TeacherCache, fields: Sequence[str], spec: TeacherSpec
) -> tuple[list[str], list[str], Any, Any]:
    """(fields that this teacher made, notes, processor, config), before any weights are loaded.

    Raises:
        CompatibilityError: no field was made by it; names what differs.
    """
    processor, config = load_processor(spec)
    ours = teacher_fingerprint(spec, processor, config)
    who = {key: value for key, value in ours.items() if key not in RUN_SETTINGS}
    theirs, notes, lines = [], [], []
    for name in fields:
        there = cache.fields[name]["teacher"]
        other = difference({key: value for key, value in there.items() if key not in RUN_SETTINGS}, who)
        if other:
            lines.append(f"{name}: {'; '.join(other)}")
            continue
        theirs.append(name)
        ran = {key: there.get(key) for key in RUN_SETTINGS}
        notes += difference(ran, {key: ours.get(key) for key in RUN_SETTINGS}, "teacher")
    if not theirs:
        raise CompatibilityError(
            f"{cache.storage}: {spec.id} is not the teacher of this cache: {lines[0] if lines else 'no field'}: "
            "give --teacher the model that made it"
        )
    notes += [f"left out, since another teacher made it: {line}" for line in lines]
    return theirs, list(dict.fromkeys(notes)), processor, config


def check_head(cache: TeacherCache, fields: Sequence[str], head: torch.Tensor) -> None:
    """CompatibilityError where the head that the cache multiplies hidden states with is not the live teacher's, W ``[V, D]``."""
    seen: dict[str, str] = {}
    for name in fields:
        sha = cache.fields[name].get("head_sha256")
        if sha and sha not in seen:
            seen[sha] = name
            stored = cache.teacher_head(name)
            if stored.shape != head.shape or not torch.equal(stored.float(), head.float().cpu()):
                raise CompatibilityError(
                    f"{cache.storage}: the head stored for {name}, {tuple(stored.shape)}, does not match the live teacher's, "
                    f"{tuple(head.shape)}: its logits would not be this teacher's"
                )


def listen(teacher: Teacher, prepared: Sequence[Prepared], wants: Wants, batch_tokens: int) -> list[TeacherOutput]:
    """The live teacher's outputs in the samples' order; KdcliError naming the first that is not finite.

    batch_tokens: padded tokens of one batch; 1: one sample at a time.
    """
    outputs = ask(teacher, prepared, wants, batch_tokens)
    bad = next((row.key for row, one in zip(prepared, outputs) if not is_finite(one)), None)
    if bad:
        raise KdcliError(f"row {bad}: the live teacher's output holds NaN or infinity: try another --dtype")
    return outputs
