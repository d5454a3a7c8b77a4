"""What a method needs of the teacher, and which fields of a cache serve it: decided before any model loads.

A need that a cache can serve only approximately says so and goes on; one that it cannot serve is refused, with the command that adds
the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.errors import CompatibilityError

TEXTS = ("response", "all")


@dataclass(frozen=True)
class OneField:
    """A need that one field serves, with a tensor a sample: what a method sees of it is the field's decoded record.

    Attributes:
        field: its name. vision_axis: of the tensor, that of vision tokens; None: it has none.
        row_aligned: vision token i of it is compared with the student's vision token i.
        states: its rows are as wide as the teacher: a method may map them.
    """

    field: str
    vision_axis: int | None = None
    row_aligned: bool = False
    states: bool = False


ONE_FIELD = {
    "vision_text_affinity": OneField("affinity", vision_axis=0),
    "text_vision_attention": OneField("attention", vision_axis=2, row_aligned=True),
    "vision_features": OneField("vision_features", vision_axis=0, row_aligned=True, states=True),
}
"""THE place where a further field meets training: a line here, and methods may need it (docs/add_a_field.md)."""
_COMPOSED = (
    "response_likeliest",
    "response_logits",
    "vision_logits",
    "vision_relation",
    "vision_raw_logits",
    "response_hidden",
    "vision_hidden",
)
"""Needs that several fields serve, alone or together."""


def whats() -> tuple[str, ...]:
    """Every ``Need.what``."""
    return (*_COMPOSED, *ONE_FIELD, "self_teacher")


def row_aligned() -> frozenset[str]:
    """Needs that compare vision token i with vision token i, unless the method matches them (``alignment.py``)."""
    own = {what for what, one in ONE_FIELD.items() if one.row_aligned}
    return frozenset({"vision_logits", "vision_relation", "vision_hidden"} | own)


def of_states() -> list[str]:
    """Needs whose rows are as wide as the teacher's hidden states."""
    return ["vision_hidden", "response_hidden", *(what for what, one in ONE_FIELD.items() if one.states)]


EXACT_CODECS = ("fp32", "bf16", "int8", "int4")
"""Codecs of hidden fields that give back hidden states, for every logit loss with the teacher's own head."""


@dataclass(frozen=True, order=True)
class Need:
    """One thing that a method must know of the teacher.

    Attributes:
        what: ``response_logits`` or ``vision_logits`` (distributions), ``vision_relation`` (Gram matrix of raw vision logits),
            ``vision_raw_logits`` (a matching cost, targets on matched rows), ``vision_text_affinity`` (cosines),
            ``response_hidden`` or ``vision_hidden`` (hidden states themselves), ``text_vision_attention`` (first-layer maps),
            ``vision_features`` (what the language model is given at vision tokens),
            ``response_likeliest`` (the likeliest token of each response row and its probability: what ``select`` asks for), or
            ``self_teacher`` (the student's own weights in a second pass: no field can hold a teacher that moves with the student).
        direction: ``forward`` (the teacher's mass weighs: KL(p_t‖p_s), cross-entropy) or ``reverse`` (the student's mass weighs: reverse
            and skewed KL, Jensen-Shannon).
        temperature: of the distributions.
        text: of cosines, with ``response`` tokens or ``all``.
    """

    what: str
    direction: str = "forward"
    temperature: float = 1.0
    text: str = "response"

    def __post_init__(self) -> None:
        if self.what not in whats() or self.direction not in ("forward", "reverse") or self.text not in TEXTS:
            raise ValueError(f"no such need: {self}")

    def __str__(self) -> str:
        if not self.what.endswith("_logits") or self.what == "vision_raw_logits":
            return self.what + (" (all text)" if self.text == "all" else SPOKEN.get(self.what, ""))
        at = "" if self.temperature == 1.0 else f", T={self.temperature:g}"
        return f"{self.what} ({self.direction}{at})"


@dataclass(frozen=True)
class Way:
    """Fields that serve a need together. ``loss``: what is lost, "" for nothing."""

    fields: tuple[str, ...]
    loss: str = ""


@dataclass(frozen=True)
class Served:
    """Which fields serve each need (by ``Need.what``); ``notes`` are for the user's eyes."""

    fields: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return sorted({name for fields in self.fields.values() for name in fields})


def ways(need: Need, codecs: Mapping[str, str]) -> list[Way]:
    """How these fields serve a need, best first.

    Args:
        codecs: field → its codec, "" where it has none, or ``INEXACT``; of affinities the text tokens that they hold.
    """
    if need.what == "self_teacher":
        return [Way(())]
    if need.what in ONE_FIELD:
        name = ONE_FIELD[need.what].field
        return [Way((name,))] if name in codecs and (need.text == "response" or codecs[name] != "response") else []
    kind = need.what.split("_")[0]
    hidden, topk, sampled = (f"{kind}_{suffix}" for suffix in ("hidden", "topk", "sampled"))
    codec = codecs.get(hidden)
    found: list[Way] = []
    if need.what == "response_likeliest" and topk in codecs:
        found.append(Way((topk,)))
    if need.what == "vision_relation" and "relation" in codecs:
        found.append(Way(("relation",)))
    if codec in EXACT_CODECS:
        found.append(Way((hidden,)))
    if need.what == hidden:
        return found
    if codec == "sketch":
        found += _sketch_ways(need, hidden, topk if codecs.get(topk, INEXACT) != INEXACT else None)
    if need.what.endswith("_logits") and need.what != "vision_raw_logits" and need.temperature == 1.0:
        if topk in codecs:
            loss = TOPK_LOSS[need.direction]
            found.append(Way((topk,), loss.replace("exact", INEXACT) if codecs[topk] == INEXACT else loss))
        if sampled in codecs and need.direction == "forward":
            found.append(Way((sampled,), "unbiased samples of the distribution: noisy, right on average"))
    return found


SPOKEN = {"response_likeliest": " (for `select`)"}
"""What stands behind a need where it is named."""
INEXACT = "inexact"
"""In place of a codec: a top-k whose tail is 1 − Σp and whose log Z is unknown."""
TOPK_LOSS = {
    "forward": "top-k with an exact tail bucket: a lower bound of the KL",
    "reverse": "top-k with an exact tail bucket: a lower bound; what the student gives to tokens outside the head is seen as one sum",
}


def _sketch_ways(need: Need, hidden: str, topk: str | None) -> list[Way]:
    if need.what == "vision_relation":
        return [Way((hidden,))]
    if topk is None and need.what == "response_likeliest":
        return [
            Way(
                (hidden,),
                "the likeliest token of a sketch without its head (top-k), which may be another than the teacher's",
            )
        ]
    if topk is None:
        return [Way((hidden,), "a sketch without its head (top-k): `kdcli fidelity` shows the error")]
    if need.temperature == 1.0:
        return [Way((topk, hidden))]
    return [Way((topk, hidden), f"at T={need.temperature:g} the tail's mass is approximate")]


def serve(needs: Iterable[Need], available: Mapping[str, Mapping[str, Any]], method: str, cache: str) -> Served:
    """Match needs with fields; CompatibilityError naming what is missing and the command that adds it.

    Args:
        available: field → its parameters, as ``field.json`` has them.
    """
    codecs = {
        name: INEXACT if params.get("tail") == INEXACT else str(params.get("codec", params.get("text", "")))
        for name, params in available.items()
    }
    fields: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for asked in grouped(needs):
        found = ways_of_all(asked, codecs)
        if not found:
            lacking = next((one for one in asked if not ways(one, codecs)), asked[-1])
            raise CompatibilityError(refusal(lacking, sorted(codecs), method, cache))
        # Fields that are read anyway cost no further bytes.
        used = {name for names in fields.values() for name in names}
        chosen = next((way for way in found if set(way.fields) <= used and not way.loss), found[0])
        fields[asked[0].what] = chosen.fields
        layer = max((available[name].get("layer", 0) for name in chosen.fields), default=0)
        if layer:
            notes.append(f"{asked[0]}: the teacher's is of its layer {layer}, the student's of its first")
        if chosen.loss:
            notes.append(f"{' and '.join(map(str, asked))} served by {' + '.join(chosen.fields)}: {chosen.loss}")
    return Served(fields, tuple(notes))


def grouped(needs: Iterable[Need]) -> list[list[Need]]:
    """Needs of one ``what`` together: a method may want it in both directions, or at two temperatures."""
    groups: dict[str, list[Need]] = {}
    for need in sorted(needs):
        groups.setdefault(need.what, []).append(need)
    return list(groups.values())


def ways_of_all(needs: Sequence[Need], codecs: Mapping[str, str]) -> list[Way]:
    """The ways that serve every one of these needs, in the order of the first; what is lost with any of them is lost."""
    each = [{way.fields: way.loss for way in ways(need, codecs)} for need in needs]
    shared = [way.fields for way in ways(needs[0], codecs) if all(way.fields in one for one in each)]
    return [Way(fields, "; ".join(dict.fromkeys(one[fields] for one in each if one[fields]))) for fields in shared]


def refusal(need: Need, have: Sequence[str], method: str, cache: str) -> str:
    """One line: the need, what would serve it, what there is, and the fix."""
    serving = served_by(need)
    heads = [name for name in have if name.endswith("_topk")]
    why = f" ({', '.join(heads)}: valid at temperature 1 only)" if heads and need.temperature != 1.0 else ""
    codec = " --set codec=bf16" if need.what.endswith("_hidden") else ""
    if need.text == "all":
        codec = " --set text=all"
        if serving[0] in have:
            why = f" ({serving[0]}: of response tokens alone; --set text=all in another cache)"
    elif codec and serving[0] in have:
        why = f" ({serving[0]}: a sketch does not give hidden states back; --set codec=bf16 or int8 in another cache)"
    return (
        f"{cache}: method {method} needs {need}, served by {' or '.join(serving)}; the cache has "
        f"{', '.join(have) or 'no field'}{why}: add one with `kdcli cache add-field {cache or 'CACHE'} --field {serving[0]}{codec}`"
    )


def served_by(need: Need) -> list[str]:
    """Every single field that can serve a need, whatever a cache has."""
    every = {f"{kind}_hidden": "bf16" for kind in ("response", "vision")}
    every |= {name: "" for name in (*(one.field for one in ONE_FIELD.values()), "relation")}
    every |= {f"{kind}_{suffix}": "" for kind in ("response", "vision") for suffix in ("topk", "sampled")}
    found = list(dict.fromkeys(name for way in ways(need, every) for name in way.fields))
    return sorted(found, key=lambda name: name == "relation")  # off by default: named last
