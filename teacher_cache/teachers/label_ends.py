"""Whether labels teach a model to stop: among those of an answer should be a token at which generation ends.

A student learns to stop only from that label. Some chat templates write none behind an answer (LLaVA-1.5's own), others write one that
neither the tokenizer nor ``generation_config.json`` names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.errors import KdcliError
from teacher_cache.models.loading import naming_what_fails
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.preparing.templates import TEMPLATES, check_tokens
from teacher_cache.records import Prepared, TextTokens
from teacher_cache.teachers.null import folder_of
from teacher_cache.teachers.transformers import TeacherSpec

NO_END, NO_STOP = "no_end_token", "end_is_no_stop"
END_KINDS = {
    NO_END: "no label of an answer is an end token: students do not learn to stop",
    NO_STOP: "an answer ends in a special token at which generation does not stop",
}


@dataclass(frozen=True)
class OpenEnd:
    """What is wrong with a row's ends. kind: of ``END_KINDS``. last: id of the last label. detail: in words."""

    kind: str
    last: int
    detail: str


class LabelEnds:
    """Looks at rows of one model.

    Args:
        stops: ids at which generation ends (``stop_ids``).
    """

    def __init__(self, preparer: Preparer, stops: frozenset[int]):
        self.preparer, self.tokenizer, self.stops = preparer, preparer.tokenizer, stops
        self._special = frozenset({*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids})

    def look(self, row: Prepared, template: str) -> OpenEnd | None:
        """What is wrong with the ends of the row's answers, the worst of it; None: nothing. Captions of ``plain`` are never answered."""
        if template == "plain":
            return None
        answers = answers_of(row.text)
        lasts = [ids[-1] for ids in answers if self.stops.isdisjoint(ids)]
        if not lasts:
            return None
        unmarked = [one for one in lasts if one not in self._special]
        last = (unmarked or lasts)[-1]
        many = f"{len(lasts)} of {len(answers)} answers: " if len(answers) > 1 else ""
        return OpenEnd(NO_END if unmarked else NO_STOP, last, f"{many}the last label is {self.token(last)}")

    def survey(self, rows: Iterable[Prepared], templates: Mapping[str, str]) -> list[str]:
        """``warnings`` of some rows, by part. templates: part → template."""
        found: dict[str, Counter[tuple[str, int]]] = {part: Counter() for part in templates}
        looked: Counter[str] = Counter()
        for row in rows:
            looked[row.part] += 1
            if end := self.look(row, templates[row.part]):
                found[row.part][end.kind, end.last] += 1
        return [line for part, own in found.items() for line in self.warnings(part, templates[part], own, looked[part])]

    def token(self, number: int) -> str:
        """A token as a person knows it: its text and its id."""
        return f"{self.tokenizer.decode([number])!r} (id {number})"

    def warnings(self, part: str, template: str, found: Mapping[tuple[str, int], int], rows: int) -> list[str]:
        """One line for each kind that was found in a part.

        Args:
            found: (kind, last label) → rows. rows: that were looked at.
        """
        return [
            self._warning(part, template, kind, found, rows) for kind in END_KINDS if any(k == kind for k, _ in found)
        ]

    def _warning(self, part: str, template: str, kind: str, found: Mapping[tuple[str, int], int], rows: int) -> str:
        counts = Counter({last: count for (one, last), count in found.items() if one == kind})
        stops = " or ".join(self.token(one) for one in sorted(self.stops)) or "no token: the model names no eos_token"
        head = f"part {part!r}, template {template!r}: in {sum(counts.values()):,} of {rows:,} rows looked at"
        if kind == NO_STOP:
            seen = ", ".join(self.token(last) for last, _ in counts.most_common(3))
            return (
                f"{head} an answer ends in {seen}, at which generation does not stop (it stops at {stops}): students write it and run on: "
                "add its id to eos_token_id in the generation_config.json of the student's folder"
            )
        return f"{head} no label ends an answer (generation stops at {stops}): students do not learn to stop, and run on: {self._fix()}"

    def _fix(self) -> str:
        if names := self.ending_templates():
            return f"use --template {' or '.join(names)} (template = in kd.toml), which ends every answer"
        return "give the model a chat template that writes its end token behind every answer"

    def ending_templates(self) -> list[str]:
        """Templates written here that this model can use, and whose end token it stops at."""
        found = []
        for name, template in TEMPLATES.items():
            try:
                check_tokens(name, self.tokenizer, self.preparer.image_token)
            except KdcliError:
                continue
            if template.tokens and self.tokenizer.convert_tokens_to_ids(template.tokens[-1]) in self.stops:
                found.append(name)
        return found


def label_ends(spec: TeacherSpec, preparer: Preparer) -> LabelEnds:
    """For the rows of a teacher."""
    return LabelEnds(preparer, stop_ids(spec, preparer.tokenizer, preparer.config))


def stop_ids(spec: TeacherSpec, tokenizer: Any, config: Any) -> frozenset[int]:
    """Ids at which generation ends: the tokenizer's ``eos_token``, and those of ``generation_config.json`` (of the configuration where
    there is no such file), as ``generate`` and servers take them."""
    from transformers import GenerationConfig

    with naming_what_fails(f"generation_config.json of {spec.id!r}"):
        try:
            generation = GenerationConfig.from_pretrained(folder_of(spec.id), revision=spec.revision or "main")
        except (OSError, ValueError):
            generation = GenerationConfig.from_model_config(config)
        listed = generation.eos_token_id
        ids = [*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id]
        return frozenset(int(one) for one in ids if one is not None)


def answers_of(text: TextTokens) -> list[list[int]]:
    """Label ids of every answer."""
    turns, ids = (column[text.response].numpy() for column in (text.turn, text.ids))
    borders = np.flatnonzero(turns[1:] != turns[:-1]) + 1
    return [one.tolist() for one in np.split(ids, borders) if len(one)]
