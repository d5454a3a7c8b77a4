"""Losses on the teacher's signals: divergences of rows, and the whole loss of any method on the batches of a step.

Divergences take a ``TeacherSignals.distribution`` and the student's logits ``[R, V]`` of the same rows, and give float32 ``[R]``, in nats,
with gradients to the logits; padding columns of a wider head are left out. Nothing is multiplied by T².

====================  ==============================================================================================
``forward_kl``        KL(teacher ‖ student), optional ``temperature``
``reverse_kl``        KL(student ‖ teacher)
``jensen_shannon``    the generalised Jensen-Shannon divergence
``skew_kl``           KL(teacher ‖ mixture), and ``skew_reverse_kl`` KL(student ‖ mixture): DistiLLM
``cross_entropy``     of the student to the labels ``[R]``
``cosine_affinity``   of vision × text affinities; ``relation_cosine`` of vision × vision Gram matrices
``label_loss``, ``RowTerm``, ``HiddenTerm``, ``SampleTerm``  what a method's ``terms()`` are made of (docs/add_a_method.md)
``StepLoss``          the loss of a dataset's method over one optimizer step
====================  ==============================================================================================
"""

from student_train.library.step_loss import StepLoss
from student_train.losses.affinity import cosine_affinity
from student_train.losses.divergences import (
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from student_train.losses.relation import relation_cosine
from student_train.losses.terms import HiddenTerm, RowTerm, SampleTerm, label_loss

__all__ = [
    "HiddenTerm",
    "RowTerm",
    "SampleTerm",
    "StepLoss",
    "cosine_affinity",
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "label_loss",
    "relation_cosine",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
]
