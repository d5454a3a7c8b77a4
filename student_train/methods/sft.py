"""Supervised fine-tuning: cross-entropy on response tokens, the baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass

from student_train.losses.terms import RowTerm, Terms, label_loss
from student_train.needs import Need

NAME = "sft"
PAPER = "Visual Instruction Tuning, arXiv 2304.08485"
STAGES = "PT,SFT"
TERMS = {
    "reg": "cross-entropy of the labels on response tokens",
}


@dataclass(frozen=True)
class SFT:
    """No knobs."""

    def needs(self) -> frozenset[Need]:
        return frozenset()

    def terms(self) -> Terms:
        return {"reg": RowTerm(1.0, "response", label_loss)}


PRESETS = {"paper": SFT(), "code": SFT()}
