"""A survey of labels as tables and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipelines.judge.labels.advice import advise, percent
from pipelines.judge.labels.survey import PartSurvey, Survey, Suspect
from pipelines.judge.labels.tally import LabelTally
from pipelines.terminal.tables import table

LONGEST = 48
"""Characters of a text in a table."""
LEAST_SHOWN = 1e-3
"""Probability below which a number says no more."""
LEGEND = (
    "contradicted: the teacher's likeliest token is another than the label somewhere in the answer; expected: as many would be if every "
    "label were right, by the teacher's own probabilities; nll: mean of a label token in nats; wrong: estimate from the difference "
    "(–: the teacher would contradict most right answers)."
)


def report(made: Survey) -> str:
    """Counts, what to expect, the first answers to look at."""
    sections = [head(made), counts_table(made), LEGEND, cut_line(made), "\n".join(f"- {one}" for one in advise(made))]
    sections += [f"note: {note}" for note in notes(made)]
    if made.worst:
        sections.append(f"The {len(made.worst)} answers to look at first:\n\n{worst_table(made)}")
    return "\n\n".join(one for one in sections if one)


def page(made: Survey) -> str:
    """For a file: counts, and the answers to look at."""
    sections = ["## Labels", counts_table(made), LEGEND, *(f"note: {note}" for note in notes(made))]
    sections += [f"The {len(made.worst)} answers to look at first:\n\n{worst_table(made)}"] if made.worst else []
    return "\n\n".join(sections)


def head(made: Survey) -> str:
    answers = sum(part.whole.answers for part in made.parts)
    rate = f", {1000 * made.seconds / made.rows:.2g} s a thousand rows" if made.rows else ""
    return f"{made.cache}: {made.rows:,} rows, {answers:,} answers held against {' + '.join(made.fields)}{rate}"


def notes(made: Survey) -> Iterator[str]:
    yield from made.notes
    for part in made.parts:
        read, planned = part.shards
        if read < planned:
            yield f"part {part.part}: {read:,} of {planned:,} shards have samples and {' + '.join(made.fields)}; the others are not counted"
    outside = sum(part.whole.outside for part in made.parts)
    if outside:
        yield f"{outside:,} label tokens are none of the stored likeliest: they count as the last of these, so their nll is more"


def cut_line(made: Survey) -> str:
    if not made.suspected:
        return "No answer is suspected: as many are contradicted as the teacher expects of right ones."
    return f"{made.suspected:,} answers are suspected: about {made.wrong:,.0f} are estimated to be wrong, and these are contradicted most."


def counts_table(made: Survey) -> str:
    """By part and source; a part of several sources has a line for all of them."""
    lines = []
    for part in made.parts:
        if len(part.sources) != 1:
            lines.append(_line(part.part, part.whole, part))
        lines += [_line(" / ".join(filter(None, (part.part, name))), one) for name, one in sorted(part.sources.items())]
    return table(["part / source", "answers", "contradicted", "expected", "nll", "wrong"], lines)


def _line(name: str, one: LabelTally, part: PartSurvey | None = None) -> list[str]:
    if not one.answers:
        return [flat(name), "0", "–", "–", "–", "–"]
    body, least = one.to_json(), "≥ " if one.outside else ""
    shares = [percent(body["contradicted"]), percent(min(1.0, body["expected"])), f"{least}{body['nll']:.3f}"]
    wrong = wrong_words(part.wrong, part.wrong_of) if part else wrong_words(one.wrong, one.answers)
    return [flat(name), f"{one.answers:,}", *shares, wrong]


def wrong_words(wrong: float, answers: int) -> str:
    """An estimated number and its share of the answers."""
    return "–" if math.isnan(wrong) else f"{max(0.0, wrong):,.0f} ({percent(max(0.0, wrong) / answers)})"


def worst_table(made: Survey) -> str:
    header = ["row", "part / source", "turn", "question", "label", "teacher"]
    return table(header, [_worst(one) for one in made.worst])


def _worst(one: Suspect) -> list[str]:
    place = flat(one.place) + (f" id {flat(one.id)}" if one.id else "")
    where = flat(" / ".join(filter(None, (one.part, one.source))))
    return [place, where, str(one.answer.turn), ending(one.question), flat(one.label), teacher_words(one)]


def teacher_words(one: Suspect) -> str:
    """``' blue' 98 %, not ' red' < 0.1 %``"""
    own = f"{100 * one.p_label:.2g} %" if one.p_label >= LEAST_SHOWN else f"< {100 * LEAST_SHOWN:g} %"
    return f"{quoted(one.expected)} {100 * one.p_expected:.0f} %, not {quoted(one.token)} {own}"


def quoted(token: str) -> str:
    return flat(repr(token))


def flat(text: str) -> str:
    """On one line of a table, cut where it is long."""
    text = " ".join(text.replace("|", "¦").split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def ending(question: str) -> str:
    """The last characters of a question, without placeholders: what it asks stands there."""
    text = " ".join(question.replace("<image>", " ").replace("|", "¦").split())
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def to_json(made: Survey) -> dict[str, Any]:
    """Plain values for ``json.dumps``."""
    parts = [
        {
            "part": part.part,
            "rows": part.rows,
            "shards": {"read": part.shards[0], "planned": part.shards[1]},
            **part.whole.to_json(),
            "wrong": max(0.0, part.wrong) if part.estimable else None,
            "wrong_error": part.error if part.estimable else None,
            "sources": [{"source": name, **one.to_json()} for name, one in sorted(part.sources.items())],
        }
        for part in made.parts
    ]
    return {
        "cache": made.cache,
        "fields": list(made.fields),
        "rows": made.rows,
        "wrong": made.wrong,
        "suspected": made.suspected,
        "cut": made.cut if made.suspected else None,
        "seconds": made.seconds,
        "parts": parts,
        "advice": advise(made),
        "notes": list(notes(made)),
        "worst": [one.to_json() for one in made.worst],
    }
