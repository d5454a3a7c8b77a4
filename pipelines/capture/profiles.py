"""What a capture stores of the teacher: a profile by name (``--store``), or fields one by one (``--fields``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from teacher_cache.errors import CompatibilityError, KdcliError

if TYPE_CHECKING:
    from teacher_cache.teachers.transformers import TeacherSpec

HEAD_K = 8
STEPS = {"response": 0.04, "vision": 0.02}
"""Of the sketches: reverse KL at vision rows wants the finer one, and pays little, since neighbouring patches are coded together."""
KINDS = ("response", "vision")
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "compact": {f"{kind}_topk": {"k": 50} for kind in KINDS},
    "standard": {
        **{f"{kind}_topk": {"k": HEAD_K} for kind in KINDS},
        **{f"{kind}_hidden": {"codec": "sketch", "step": STEPS[kind]} for kind in KINDS},
        "affinity": {"layout": "factored"},
    },
    "none": {},
    "exact": {**{f"{kind}_hidden": {"codec": "bf16"} for kind in KINDS}, "affinity": {"layout": "dense"}},
}
"""compact: forward KL with a tail bucket. standard: head + sketch, every logit loss, relations, matching and affinities at a few per
cent of the bytes. exact: hidden states as they are, every loss at any temperature. none: the samples alone."""


def chosen_fields(
    store: str, fields: tuple[str, ...], params: Mapping[str, Mapping[str, Any]], images: bool = True
) -> dict[str, dict[str, Any]]:
    """Field → parameters, in writing order.

    Args:
        images: the teacher reads images. One of text alone has the profile's fields of responses.
        fields: takes the place of the profile where it is not empty; such fields start from their own defaults.
        params: ``[fields.NAME]`` of kd.toml, over the profile's. A field whose codec or layout changes drops the profile's other
            parameters with it.
    """
    if store not in PROFILES:
        raise KdcliError(f"--store {store!r}: choose from {', '.join(PROFILES)}")
    wanted = {name: {} for name in fields} if fields else PROFILES[store]
    if not images:
        refuse_fields_of_images(fields)
        of_images = fields_of_images(wanted)
        wanted = {name: values for name, values in wanted.items() if name not in of_images}
        params = {name: values for name, values in params.items() if name not in of_images}
    unknown = sorted(set(params) - set(wanted))
    if unknown:
        raise KdcliError(
            f"parameters for {', '.join(unknown)}, but these fields are not captured: add them to --fields"
        )
    return {name: _over(wanted[name], params.get(name, {})) for name in wanted}


def fields_of_images(names: Iterable[str]) -> list[str]:
    """Those of the fields that hold what a teacher says at, or of, vision tokens."""
    from teacher_cache.fields import create_field

    return [name for name in names if create_field(name).wants.of_images]


def refuse_fields_of_images(names: Iterable[str]) -> None:
    """CompatibilityError for fields that a teacher of text alone cannot give."""
    from teacher_cache.fields import field_kinds

    if asked := fields_of_images(names):
        others = sorted(set(field_kinds()) - set(fields_of_images(field_kinds())))
        raise CompatibilityError(
            f"field {asked[0]} stores image signals, and this teacher is text-only: leave it out (it has "
            f"{', '.join(others)}), or give a teacher that reads images"
        )


def with_tails(fields: Mapping[str, Mapping[str, Any]], teacher: TeacherSpec) -> dict[str, dict[str, Any]]:
    """The same, flagged where this teacher's top-k has no exact tail."""
    from teacher_cache.teachers.backends import tells_tails  # torch: a shell that completes names does not wait for it

    flag = {} if tells_tails(teacher) else {"tail": "inexact"}
    return {name: {**params, **(flag if name.endswith("_topk") else {})} for name, params in fields.items()}


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    changes_kind = any(given.get(key, base.get(key)) != base.get(key) for key in ("codec", "layout"))
    return {**({} if changes_kind else base), **given}
