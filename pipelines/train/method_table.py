"""``kdcli methods``: what is offered, what each method needs and which fields serve it; and what is not offered, with the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.terminal.tables import table
from student_train.methods import create_method, method_modules, presets_of, terms_of
from student_train.needs import Need, served_by


@dataclass(frozen=True)
class NotOffered:
    """A published method, or a part of one, that is not here. instead: what comes nearest, "" for nothing."""

    name: str
    reason: str
    instead: str
    paper: str


LIVE = (
    NotOffered(
        "MiniLLM, on-policy",
        "the student writes responses at every step and the teacher rewards them; a cache cannot hold responses that do not exist yet",
        "minillm-offline",
        "arXiv 2306.08543",
    ),
    NotOffered(
        "DistiLLM, adaptive off-policy",
        "the student's responses replace the dataset's during training, and the teacher has to score them",
        "distillm-offline",
        "arXiv 2402.03898",
    ),
    NotOffered(
        "GKD, on-policy",
        "the divergence is taken on responses that the student samples; a cache has no teacher distributions for them",
        "jsd",
        "arXiv 2306.13649",
    ),
)
"""What truly needs the teacher on the GPU while the student trains."""
LATER = (
    NotOffered(
        "llava-mod",
        "its mimic stage is kd; experts and the preference (KTO) stage are missing",
        "kd",
        "arXiv 2408.15881",
    ),
    NotOffered("sparsevlm", "removal of vision tokens inside the language model", "", "arXiv 2410.04417"),
    NotOffered("voco", "compression of vision tokens into a few learned ones", "", "arXiv 2406.12275"),
)


def offered() -> list[dict[str, Any]]:
    """Every method by its default preset: ``{"method", "needs", "served_by", "stages", "presets", "paper", "terms"}``."""
    found = []
    for name, module in method_modules().items():
        needs = sorted(create_method(name).needs())
        found.append(
            {
                "method": name,
                "needs": [str(need) for need in needs],
                "served_by": [serving(need) for need in needs],
                "stages": module.STAGES,
                "presets": list(presets_of(name)),
                "paper": module.PAPER,
                "terms": terms_of(name),
            }
        )
    return found


def serving(need: Need) -> str:
    """The fields that serve a need, each by itself."""
    return "the student itself" if need.what == "self_teacher" else " or ".join(served_by(need))


def as_json() -> dict[str, Any]:
    return {
        "methods": offered(),
        "needs_live_teacher": [asdict(one) for one in LIVE],
        "later": [asdict(one) for one in LATER],
    }


def text() -> str:
    """The table, the loss terms, and what is not offered."""
    body = [
        [
            one["method"],
            ", ".join(one["needs"]) or "none",
            "; ".join(one["served_by"]) or "samples alone",
            one["stages"],
            one["paper"],
        ]
        for one in offered()
    ]
    return "\n".join(
        [
            table(["method", "needs", "served by", "stages", "paper"], body),
            "",
            "Loss terms, as logs, tables, --schedule and --select name them (p_t: teacher, p_s: student):",
            *term_lines(),
            "",
            "Not offered, because they need the live teacher while the student trains:",
            *map(_line, LIVE),
            "",
            "Not implemented yet:",
            *map(_line, LATER),
        ]
    )


def term_lines() -> list[str]:
    """A line for each loss term with its methods; a name that means different things has a line for each."""
    methods: dict[tuple[str, str], list[str]] = {}
    for name, module in method_modules().items():
        for term, words in getattr(module, "TERMS", {}).items():
            methods.setdefault((term, words), []).append(name)
    return [f"- {term}: {words} ({', '.join(names)})" for (term, words), names in sorted(methods.items())]


def _line(one: NotOffered) -> str:
    nearest = f" (nearest: {one.instead})" if one.instead else ""
    return f"- {one.name}, {one.paper}: {one.reason}{nearest}"
