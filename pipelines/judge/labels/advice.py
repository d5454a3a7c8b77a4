"""What a survey of the labels lets one expect of distillation, in one sentence a part.

What is known: in the demo world, where 40 % of the answers were wrong, distilling without the labels (``reg = 0``) gained 10.6 exact-match
points over training on them, at the same cost a step. Where all were right, distilling responses alone gained nothing, and all of LLaVA-KD
1.9 ± 0.8. Shares between were not measured: the bounds below are where the sentences change, not where a gain begins.
"""

from __future__ import annotations

from pipelines.judge.labels.survey import PartSurvey, Survey

NOISY = 0.1
"""Share of wrong answers from which on labels are advised against: a quarter of what was measured to be worth it."""
CLEAN = 0.03
"""Share up to which labels and teacher agree: a teacher's own miscalibration is as large."""
LEAST_ANSWERS = 30
"""Of fewer, a share says nothing: one answer is 3 points."""
SOURCES_NAMED = 3
SELECT = "--select reg=unless-contradicted:0.9"


def advise(made: Survey) -> list[str]:
    """One sentence for every part of which something was read."""
    return [_sentence(part) for part in made.parts if part.rows]


def _sentence(part: PartSurvey) -> str:
    whole = part.whole
    if whole.answers < LEAST_ANSWERS:
        return f"part {part.part}: {whole.answers} answers were checked, too few to judge its labels"
    head = (
        f"part {part.part}: the teacher contradicts {percent(whole.contradicted / whole.answers)} of the answers, "
        f"and would contradict {percent(min(1.0, whole.doubt / whole.answers))} if all were right"
    )
    if not part.estimable:
        return f"{head}: its answers are long or free, so there is no estimate of wrong ones"
    share, error = max(0.0, part.wrong) / part.wrong_of, part.error / part.wrong_of
    if share >= NOISY and share >= 2 * error:
        return (
            f"{head}: about {percent(share)} (± {percent(error)}) are wrong{_sources(part)}. Distil with reg = 0 there "
            f"(--set reg=0), or leave these answers out of the cross-entropy ({SELECT})"
        )
    if share <= CLEAN:
        return f"{head}: labels and teacher agree, so expect little from distilling responses alone"
    return f"{head}: about {percent(share)} (± {percent(error)}) are wrong{_sources(part)}. Look at the first ones, or train with {SELECT}"


def _sources(part: PartSurvey) -> str:
    """The sources with most wrong answers, where there are several."""
    known = {name: one.wrong / one.answers for name, one in part.sources.items() if one.estimable}
    if len(known) < 2:
        return ""
    named = sorted(known, key=lambda name: (-known[name], name))[:SOURCES_NAMED]
    return f" ({', '.join(f'{name} {percent(max(0.0, known[name]))}' for name in named)})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"
