"""What a model makes of W·h before it calls it logits: a scale and a soft cap, seen at the model's own outer forward.

Names in a configuration prove nothing: the same text model is capped inside one class and not inside another. So the outer forward runs
on made-up hidden states and a made-up product, in the place of decoder and head: no layer is run, and what is seen does not depend on
how large the logits of some weights happen to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head import cap_in_place
from teacher_cache.models.kind import decoder_of

NOT_PLAIN = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)
"""Entries of configurations whose head may be more than W·h."""
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of a first batch's logits, relative to the largest; half precision rounds the model's own logits."""
SMALL, LARGE = 2.0**-20, 2.0**40
"""Products so small that no cap is seen, and so large that nothing else is."""
POINTS = (0.0, SMALL, -SMALL, 0.5, -3.0, 20.0, -75.0, LARGE, -LARGE)
EXACT, ROUNDING = 1e-5, 1e-12
"""Relative: what an outer forward that computes in float32 leaves, and what one in float64 does."""


@dataclass(frozen=True)
class HeadForm:
    """logits = scale · W·h where ``cap`` is None, else cap · tanh(scale · W·h / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def weight(self, head: torch.Tensor) -> torch.Tensor:
        """scale · W, the very same tensor at scale 1: hidden states stay as they are. Powers of two are exact in every dtype."""
        return head if self.scale == 1.0 else head * self.scale


class _Said:
    """The output of a decoder that did not run: of whatever else is asked, None."""

    def __init__(self, states: torch.Tensor):
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, number: Any) -> torch.Tensor:
        return self.last_hidden_state


def head_form(model: Any) -> HeadForm:
    """What stands between W·h and the model's logits.

    Args:
        model: a transformers model with its head: ``decoder_of`` it returns the hidden states that the head reads.

    Raises:
        CompatibilityError: there is no such decoder or head, the head has a bias, or the logits are of no form that is known here.
    """
    name, inner, head = type(model).__name__, decoder_of(model), model.get_output_embeddings()
    if inner is None or not hasattr(head, "weight") or model.config.is_encoder_decoder:
        raise CompatibilityError(
            f"{name} has no decoder whose last hidden states are the head's only input: not supported"
        )
    if getattr(head, "bias", None) is not None:
        raise CompatibilityError(f"the head of {name} has a bias: logits are not W·h; not supported")
    points = torch.tensor(POINTS, dtype=torch.float64, device=head.weight.device)
    given = points.repeat(-(-len(head.weight) // len(points)))[: len(head.weight)]
    states = torch.linspace(-1.0, 2.0, 2 * head.weight.shape[1], dtype=torch.float64, device=given.device)
    try:
        read, said = _outer_forward(model, states.view(1, 2, -1), given.expand(1, 2, -1))
    except Exception:  # it wants more than made-up input; the first batch's own logits are looked at in any case
        return HeadForm()
    form = _fitted(states.view(1, 2, -1), given, read, said)
    if form is None:
        raise CompatibilityError(f"the logits of {name} are not those of its head{_guilty(model)}: not supported")
    return form


@torch.no_grad()
def _outer_forward(model: Any, states: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the head was given, the model's logits) where the decoder says ``states`` and the head ``product``."""
    read: list[torch.Tensor] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        read.append(hidden)
        return product.clone()  # the outer forward may write into it

    ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
    with (
        _forward_of(decoder_of(model), lambda *_, **__: _Said(states)),
        _forward_of(model.get_output_embeddings(), head),
    ):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return read[0], logits


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """``module`` says what ``forward`` says; a forward of the instance's own comes back afterwards."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _fitted(states: torch.Tensor, given: torch.Tensor, read: torch.Tensor, said: torch.Tensor) -> HeadForm | None:
    """None where no form gives these logits."""
    before = float((read * states).sum() / states.square().sum())
    if not _close(read, before * states) or said.shape[-1] != len(given):
        return None
    said = said[0, -1].to(torch.float64)
    scale, top = float(said[POINTS.index(SMALL)]) / SMALL, float(said[POINTS.index(LARGE)])
    plain = abs(top - scale * LARGE) <= EXACT * abs(top)
    scale *= before
    form = HeadForm(1.0 if abs(scale - 1.0) < ROUNDING else scale, None if plain else top)
    if not form.scale > 0 or (form.cap is not None and not form.cap > 0):
        return None
    return form if _close(said, cap_in_place(form.scale / before * given, form.cap)) else None


def _close(said: torch.Tensor, expected: torch.Tensor) -> bool:
    return said.shape == expected.shape and torch.allclose(said.to(expected.dtype), expected, rtol=EXACT, atol=0.0)


def _guilty(model: Any) -> str:
    """The entries of its configuration that may be why."""
    text = model.config.get_text_config()
    found = {name: getattr(text, name, getattr(model.config, name, None)) for name in NOT_PLAIN}
    told = ", ".join(f"{name} = {value}" for name, value in found.items() if value not in (None, 1))
    return f" (its configuration has {told})" if told else ""


def check_rows(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    states: torch.Tensor,
    ours: Any,
    columns: int,
    at: torch.Tensor | None = None,
) -> bool:
    """Whether the model's own logits were looked at: False where they are not finite. CompatibilityError where ours are others.

    Some tokens of a batch's first row are compared, through one more forward of the whole model.

    Args:
        inputs: of ``decoder_of(model)``, padded on the right. states: what it said, ``[B, T, D]``.
        ours: hidden states ``[R, D]`` → our logits ``[R, V]``. columns: of V, how many we have (others are padding).
        at: which tokens; None: the last ones that ``attention_mask`` says are no padding, whose states may be zero.
    """
    at = inputs["attention_mask"][0].nonzero().flatten()[-4:] if at is None else at
    own = model(**inputs, use_cache=False, logits_to_keep=at).logits[0]
    own = (own if len(own) == len(at) else own[at])[:, :columns].to(torch.float32)
    if not torch.isfinite(own).all():
        return False
    found = ours(states[0, at])[:, :columns]
    tolerance = TOLERANCE if states.dtype == torch.float32 else HALF_TOLERANCE
    weight = model.get_output_embeddings().weight
    # Logits that cancel are as exact as their terms are.
    noise = torch.finfo(states.dtype).eps * states[0, at].float().norm(dim=1).max() * weight.float().norm(dim=1).max()
    off = (own - found).abs().max()
    if off > tolerance * own.abs().max() + noise:
        raise CompatibilityError(
            f"the logits of {type(model).__name__} are not those of its head{_guilty(model)}: they are off by {off:.3g} "
            f"of {own.abs().max():.3g}; not supported"
        )
    return True
