"""VQA accuracy (Antol et al. 2015, arXiv 1505.00468, section 3; answer processing of the public VQA evaluation code, vqaEval.py).

With ten people's answers: the mean, over every nine of them, of min(answers equal to the model's / 3, 1). Both sides are normalised
first (``normalise``).

- The public code leaves normalisation out where all ten agree letter by letter; here it is always done, so "Two." fits ten times "2".
- With fewer than four answers no answer could reach 1: the value is divided by what an answer that everyone gives gets. With
  one answer it is 1 or 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NAME = "vqa_accuracy"

ENOUGH = 3  # people who agree

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")  # not the point of 0.5
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}

# The contractions that the public code knows, by what stands behind the last apostrophe.
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she someone something somebody there they we who you",
    "'ll": "how it someone something somebody they what who why you",
    "'re": "they there what why you",
    "'s": "he how someone something somebody that there what when where who why",
}


def _contractions() -> dict[str, str]:
    """What is written with an apostrophe missing (``dont``, ``couldnt've``) → how it is written."""
    whole = [stem + end for end, stems in _CONTRACTED.items() for stem in stems.split()]
    found = {"somebody'd": "somebodyd"}  # as it stands there
    for word in [*whole, "ma'am", "o'clock", "y'all", "y'all'll", "y'all'd've", "'ow's'at", "'twas"]:
        for at, character in enumerate(word):
            if character == "'":
                found[word[:at] + word[at + 1 :]] = word
    return found


_CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """Lower case; punctuation, full stops and articles away; numbers up to ten as digits; apostrophes where they belong.

    A mark goes without leaving a gap where it touches a space anywhere in the text, or where the text has a number like 1,000; otherwise it
    becomes a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = bool(_COMMA_IN_NUMBER.search(text))
    bare = text
    for mark in _MARKS:
        glued = joined or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if glued else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", bare).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def score(given: str, references: Sequence[str]) -> float:
    """0 to 1."""
    said, people = normalise(given), len(references)
    agree = sum(normalise(one) == said for one in references)
    return _leave_one_out(agree, people) / _leave_one_out(people, people)


def _leave_one_out(agree: int, people: int) -> float:
    """Mean over everyone left out: ``agree`` times one who agrees, the other times one who does not."""
    if people == 1:
        return float(agree)
    without = [min((agree - 1) / ENOUGH, 1.0), min(agree / ENOUGH, 1.0)]
    return (agree * without[0] + (people - agree) * without[1]) / people
