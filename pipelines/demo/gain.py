"""What the demo shows: the distilled student beside tuned SFT, in one sentence that is made of the figures at hand, and what both cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.demo.questions import IMAGE_FAMILIES
from pipelines.demo.students import DISTILLED, SFT, Trained
from pipelines.report.lead import Lead
from pipelines.report.runs import RunRecord
from pipelines.terminal.tables import human_bytes

Z = 2.0
"""Standard errors that a difference of exact match must exceed to be called shown."""


@dataclass(frozen=True)
class KnownGain:
    """Differences kd − sft of several seeds: what ``command`` saved. share: of wrong training answers. seed: of the order of rows."""

    command: str
    share: float
    seeds: tuple[int, ...]
    points: tuple[float, ...]
    nats: tuple[float, ...]


KNOWN = KnownGain(
    "python -m benchmarks.demo_gain --seeds 5 --save",
    0.4,
    (0, 1, 2, 3, 4),
    (14.38, 11.67, 12.71, 11.25, 17.08),
    (-0.1034, -0.1306, -0.1135, -0.1056, -0.1094),
)


@dataclass(frozen=True)
class Gain:
    """Both students' results on questions with an image. Those without are apart: their start can answer them.

    Attributes:
        wrong, answers: of the training rows. questions: held out, with an image.
        percent: exact match of sft and kd, mean of the image families. nats: a token of the expected answers, likewise; None: it diverged.
        text: exact match of both on questions without an image, percent.
    """

    wrong: int
    answers: int
    questions: int
    percent: tuple[float, float]
    nats: tuple[float | None, float | None]
    text: tuple[float, float]

    @property
    def points(self) -> float:
        return self.percent[1] - self.percent[0]

    @property
    def nats_less(self) -> float | None:
        sft, distilled = self.nats
        return None if sft is None or distilled is None else distilled - sft

    @property
    def doubt(self) -> float:
        """Points within which chance alone may put two equal students: ``Z`` standard errors of so many questions."""
        variances = ((one / 100) * (1 - one / 100) / self.questions for one in self.percent)
        return 100 * Z * math.sqrt(sum(variances))

    @property
    def shown(self) -> bool:
        return self.points > self.doubt and (self.nats_less is None or self.nats_less < 0)


def gain_of(trained: Sequence[Trained], wrong: int, answers: int) -> Gain:
    scores = {one.row: one.scores["families"] for one in trained}
    both = [scores[SFT], scores[DISTILLED]]
    percent, nats, text = (
        tuple(value(of) for of in both)
        for value in (lambda of: 100 * image_mean(of, "exact_match"), _nats, lambda of: 100 * of["text"]["exact_match"])
    )
    return Gain(wrong, answers, sum(both[0][one]["n"] for one in IMAGE_FAMILIES), percent, nats, text)  # type: ignore[arg-type]


def image_mean(families: Mapping[str, Mapping[str, float]], name: str) -> float:
    """Mean of a figure over the image families of an evaluation's scores."""
    return statistics.fmean(families[one][name] for one in IMAGE_FAMILIES)


def _nats(families: Mapping[str, Mapping[str, float]]) -> float | None:
    return None if any(families[one]["nll"] is None for one in IMAGE_FAMILIES) else image_mean(families, "nll")


def sentence(gain: Gain) -> str:
    """What was compared, what came of it, and what follows."""
    sft, kd = gain.percent
    share = gain.wrong / gain.answers if gain.answers else 0.0
    labels = f"{100 * share:.0f} % of the training answers wrong" if gain.wrong else "every training answer right"
    less = "" if gain.nats_less is None else f", {signed(gain.nats_less, 3)} nats a token"
    compared = (
        f"With {labels}, the student that learnt the cached teacher's words ({DISTILLED}) answers {kd:.1f} % of {gain.questions} held-out "
        f"questions about an image, tuned {SFT} {sft:.1f} % after as many steps ({signed(gain.points, 1)} points{less})"
    )
    if gain.shown:
        return f"{compared}: distilling pays here."
    if gain.points < -gain.doubt:
        return f"{compared}: distilling does not pay here."
    return (
        f"{compared}: no gain is shown, for so many questions tell no less than ±{gain.doubt:.1f} points from chance."
    )


def lead(gain: Gain, facts: Mapping[str, str]) -> Lead:
    """The sentence with the figures behind it, for the terminal and the top of the report."""
    figures = [
        (
            f"{signed(gain.points, 1)} points",
            f"exact match with an image, {DISTILLED} {gain.percent[1]:.1f} %, {SFT} {gain.percent[0]:.1f} %",
        )
    ]
    if gain.nats_less is not None:
        sft, kd = gain.nats
        figures.append(
            (
                f"{signed(gain.nats_less, 3)} nats",
                f"a token of the right answers, {DISTILLED} {kd:.3f}, {SFT} {sft:.3f}",
            )
        )
    return Lead(sentence(gain), figures, list(facts.items()))


def compared(gain: Gain, steps: tuple[int, int], batch_size: int, learning_rates: tuple[float, float]) -> str:
    """Under what conditions, and what each student saw. learning_rates: of sft and kd."""
    wrong = ""
    if gain.wrong:
        wrong = f", of which {gain.wrong:,} of {gain.answers:,} are wrong (planted, listed in wrong_answers.json)"
    return (
        f"the same start, rows and order, {steps[0]} + {steps[1]} steps of {batch_size} rows. {SFT} learns the answers{wrong}, "
        f"in one stage at {learning_rates[0]:g}, the best learning rate of those tried on the default demo; {DISTILLED} learns the "
        f"teacher's stored distributions alone (reg = 0), at {learning_rates[1]:g}. Captions and held-out questions are clean. "
        f"Questions without an image are apart, since the start can answer most of them and training here costs some of "
        f"that: {DISTILLED} {gain.text[1]:.0f} %, {SFT} {gain.text[0]:.0f} %."
    )


def spread(known: KnownGain) -> str:
    """Over the seeds that are known: mean ± standard deviation, and the least gain."""
    points, nats = known.points, known.nats
    told = f"{signed(statistics.mean(points), 1)} ± {statistics.stdev(points):.1f} points, at least {signed(min(points), 1)}; "
    told += f"{signed(statistics.mean(nats), 3)} ± {statistics.stdev(nats):.3f} nats, at least {signed(max(nats), 3)}"
    return f"{told} (seeds {known.seeds[0]}–{known.seeds[-1]} of the order of rows: {known.command})"


def cost(runs: Mapping[str, RunRecord], capture_seconds: float | None, cache_bytes: int) -> str:
    """Training of both, and the cache's, which every further student shares. capture_seconds: None where it was there before."""
    trained = ", ".join(f"{name} {seconds_of(run):.0f} s" for name, run in runs.items())
    captured = "was there before" if capture_seconds is None else f"took {capture_seconds:.0f} s, once for all students"
    return f"training {trained}, side by side; the cache {captured}, {human_bytes(cache_bytes)}"


def seconds_of(run: RunRecord) -> float:
    """Of all steps, waiting for data included."""
    points = (point for stage in run.stages for point in stage.points)
    return sum(point.get("seconds", 0.0) + point.get("data_seconds", 0.0) for point in points)


def signed(value: float, digits: int) -> str:
    """With its sign, which is a minus and not a hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−")
