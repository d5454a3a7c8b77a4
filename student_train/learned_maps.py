"""A method's learned maps between hidden states of the student and of the teacher."""

from __future__ import annotations

from typing import Any

import torch

from student_train.methods import Method, hook
from student_train.needs import Served, of_states
from teacher_cache.errors import CompatibilityError
from teacher_cache.reading.cache import TeacherCache


def learned_maps(
    cache: TeacherCache, served: Served, method: Method, name: str, seed: int, model: Any
) -> dict[str, torch.nn.Module]:
    """The method's maps between hidden states of the student and of the teacher whose fields serve it; none for most methods.

    Fresh weights are a function of the seed, whatever was drawn before.

    Args:
        name: of the method.

    Raises:
        CompatibilityError: the states that the method maps are of teachers of several widths.
    """
    fields = sorted({one for need in of_states() for one in served.fields.get(need, ())})
    widths = {one: cache.fields[one]["teacher"]["hidden_size"] for one in fields}
    if not widths:
        return {}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{one} {width}" for one, width in widths.items())
        raise CompatibilityError(
            f"{cache.storage}: {name} maps hidden states of one width; its fields have several ({told}): capture them with one teacher"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = next(iter(widths.values()))
        return hook(method, "maps")(model.config.get_text_config().hidden_size, width) or {}
