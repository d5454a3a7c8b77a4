"""A model's forward with vision tokens taken out between two of its layers: hooks on its decoder layers, nothing of the model is rewritten.

Kept tokens keep their order and, but for operators that renumber them, their ORIGINAL position ids. Samples keep different numbers, so
they are padded anew, on the side where the input is padded. Works around ``model.model(…, use_cache=False)``, with gradients and gradient
checkpointing (whose recomputation starts inside a layer, after its hooks), and around ``model.generate(…)``, where each layer's cache has
the length of what it saw.

Shapes: B samples, T tokens before, T' after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from student_train.pruning import ATTENTION_IMPLEMENTATIONS, Pruning, operator_module
from student_train.pruning.masks import attention_mask
from student_train.pruning.ranking import RankedTokens, Ranking, RankingInput
from teacher_cache.errors import CompatibilityError
from teacher_cache.families import family_of
from teacher_cache.models.attention import check_attention


@contextmanager
def prune_vision(
    model: Any,
    pruning: Pruning,
    query_at: torch.Tensor | None = None,
    images: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[PrunedForward]:
    """While the context is open, forwards of ``model`` (an image-text-to-text model of transformers) are pruned.

    Args:
        query_at: int64 ``[B]``, the row whose attention ranks: in training the one before the first response row, or responses
            would choose what they are asked about; or ``[B, Q]``, that of every turn, -1 where a sample has fewer, of which most
            operators ask the first alone. None: each sample's last token (generation).
        images: images of each sample; None: runs of vision tokens are counted, which takes images without anything between them
            as one. Only ``Pruning.keep`` asks.
        generator: of random choices; None: the global one.

    Yields:
        What was kept, of the newest forward.
    """
    pruning.check(model.config, from_the_top=True)
    forward = PrunedForward(model, pruning, query_at, images, generator)
    try:
        forward.attach()
        yield forward
    finally:
        forward.detach()


@dataclass
class Kept:
    """The tokens that layers from one depth on see.

    Attributes:
        positions: int64 ``[B, T']``, rows of the input, -1 on padding. valid: bool ``[B, T' + decoded]``, over the keys in the cache.
        inputs: keyword arguments of the layers in place of those of the whole sequence.
    """

    positions: torch.Tensor
    valid: torch.Tensor
    inputs: dict[str, Any] = field(default_factory=dict)


class PrunedForward:
    """The hooks of ``prune_vision``, and what they kept."""

    positions: torch.Tensor
    """int64 ``[B, T']``: the input row of every row of the last hidden states, -1 on padding."""
    before: RankingInput | None
    """What the layer before the next pruned one was given."""

    def __init__(
        self,
        model: Any,
        pruning: Pruning,
        query_at: torch.Tensor | None,
        images: Sequence[int] | None,
        generator: torch.Generator | None,
    ):
        self.base = model.model
        try:
            text = family_of(model.config).language_model(self.base)
        except AttributeError as error:
            raise CompatibilityError(f"{error}: it cannot be pruned") from None
        self.layers, self.rotary = text.layers, text.rotary_emb
        for layer in self.layers:
            check_attention(layer)
            check_recomputation(layer)
        self.implementation = text.config._attn_implementation
        if self.implementation not in ATTENTION_IMPLEMENTATIONS:
            raise CompatibilityError(
                f"pruning with attention {self.implementation!r}: choose from {', '.join(ATTENTION_IMPLEMENTATIONS)}"
            )
        self.image_token = model.config.image_token_id
        self.depths = pruning.depths(len(self.layers))
        operator = operator_module(pruning.operator)
        self.renumbers = getattr(operator, "RENUMBERS", False)
        self.every_turn = getattr(operator, "EVERY_TURN", False)
        self.query_at, self.ranking = query_at, Ranking(pruning, images, generator, text.norm)
        self._handles: list[Any] = []

    def attach(self) -> None:
        self._handles.append(self.base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        for number in range(max(0, min(self.depths, default=len(self.layers)) - 1), len(self.layers)):
            hook = LayerHook(self, number)
            self._handles.append(self.layers[number].register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat rows into ``[B·T]`` → flat rows into ``[B·T']`` of the pruned states, -1 where the token was removed."""
        batch, length = self.vision.shape
        places = torch.full((batch, length), -1, dtype=torch.int64, device=flat.device)
        sample, column = (self.positions >= 0).nonzero(as_tuple=True)
        places[sample, self.positions[sample, column]] = sample * self.positions.shape[1] + column
        return places.flatten()[flat]

    # ---- the hooks, in the order in which a forward meets them

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A first pass starts anew; a decoding step appends to what the layers keep."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise CompatibilityError(f"pruning needs a cache that grows by layer, not {type(cache).__name__}")
        if ids is None or not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            raise CompatibilityError("pruning needs input_ids and a two-dimensional attention_mask, by keyword")
        self.decoding = cache is not None and cache.get_seq_length() > 0
        if self.decoding:
            new = ids.new_ones(ids.shape) if mask is None else mask[:, -ids.shape[1] :]
            for kept in {id(one): one for one in self.kept.values()}.values():
                kept.valid = torch.cat([kept.valid, new.bool()], dim=1)
                kept.inputs = {"attention_mask": self._mask(kept.valid, ids.shape[1])}
            return
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.positions = rows.masked_fill(~valid, -1)
        self.vision = (ids == self.image_token) & valid
        # Padding goes where the input has it; where it has none, to the left: generation reads the last column.
        self.pad_left = bool(valid[:, -1].all())
        asking = self.positions.amax(dim=1) if self.query_at is None else self.query_at.to(ids.device)
        asking = asking.reshape(len(ids), -1)
        self.asking = asking if self.every_turn else asking[:, :1]
        self.before = None
        self.kept: dict[int, Kept] = {}
        self.newest: Kept | None = None

    def _mask(self, valid: torch.Tensor, queries: int) -> torch.Tensor | None:
        dtype = next(self.layers[0].parameters()).dtype
        return attention_mask(valid, queries, self.implementation, dtype)

    def before_layer(
        self, number: int, hidden: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Hidden states and keyword arguments with which layer ``number`` runs."""
        if self.decoding:
            kept = self.kept.get(number)
            if kept is not None and self.renumbers and "position_embeddings" not in kept.inputs:
                kept.inputs |= self._renumbered(hidden, kept.valid)
            return hidden, inputs if kept is None else {**inputs, **kept.inputs}
        if number in self.depths:
            tokens = RankedTokens(self.positions, self.vision, self.asking)
            rotary = (inputs if self.newest is None else self.newest.inputs)["position_embeddings"]
            own = RankingInput(self.layers[number], hidden.detach(), rotary)
            keep = self.ranking.staying(self.depths[number], tokens, self.before, own)
            if keep is not None:
                index = self._gathered(keep)
                hidden = hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2]))
                self._keep(index, inputs, hidden)
        if self.newest is not None:
            self.kept[number] = self.newest
            inputs = {**inputs, **self.newest.inputs}
        if number + 1 in self.depths:
            self.before = RankingInput(self.layers[number], hidden.detach(), inputs["position_embeddings"])
        return hidden, inputs

    def _renumbered(self, hidden: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
        """Positions of the last rows of ``valid`` ``[B, T]``, as many as ``hidden`` has: each sample's tokens are counted from 0."""
        places = (valid.cumsum(dim=1) - 1).clamp_min(0)[:, -hidden.shape[1] :]
        # Layers turn by position_embeddings; flash kernels read position_ids for packed sequences, which padding is not.
        flash = self.implementation.startswith("flash")
        return {"position_embeddings": self.rotary(hidden, places), "position_ids": None if flash else places}

    def _keep(self, index: torch.Tensor, inputs: dict[str, Any], hidden: torch.Tensor) -> None:
        """From here on, layers see rows ``index`` ``[B, T']`` of what they saw before; self.positions is already theirs."""
        before = inputs if self.newest is None else self.newest.inputs
        if self.renumbers:
            valid = self.positions >= 0
            new = {"attention_mask": self._mask(valid, valid.shape[1]), **self._renumbered(hidden, valid)}
            self.newest = Kept(self.positions, valid, new)
            return
        at = index[:, :, None]
        cos, sin = (
            one.expand(len(index), -1, -1).gather(1, at.expand(-1, -1, one.shape[2]))
            for one in before["position_embeddings"]
        )
        valid = self.positions >= 0
        new = {"position_embeddings": (cos, sin), "attention_mask": self._mask(valid, valid.shape[1])}
        if before.get("position_ids") is not None:
            # Layers turn by position_embeddings; flash kernels read position_ids for packed sequences, which gaps are not.
            flash = self.implementation.startswith("flash")
            new["position_ids"] = None if flash else before["position_ids"].expand(len(index), -1).gather(1, index)
        self.newest = Kept(self.positions, valid, new)

    def _gathered(self, keep: torch.Tensor) -> torch.Tensor:
        """Rows of the current sequence in their new places, ``[B, T']``. Moves ``self.positions`` along."""
        length = int(keep.sum(dim=1).max())
        # A stable sort brings the kept rows together without changing their order.
        index = keep.to(torch.uint8).argsort(dim=1, descending=not self.pad_left, stable=True)
        index = index[:, -length:] if self.pad_left else index[:, :length]
        self.positions = self.positions.gather(1, index).masked_fill(~keep.gather(1, index), -1)
        return index


def check_recomputation(layer: torch.nn.Module) -> None:
    """CompatibilityError where gradient checkpointing would run a layer's hooks again, when they may be gone.

    Older releases of transformers checkpoint a layer's ``__call__``, hooks and all; newer ones its ``forward`` only.
    """
    outer = any("__call__" in vars(one) for one in type(layer).__mro__ if one is not torch.nn.Module)
    if outer and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise CompatibilityError(
            "vision tokens cannot be removed under the gradient checkpointing of this version of transformers: "
            "upgrade it, or set gradient_checkpointing = false"
        )


@dataclass(frozen=True)
class LayerHook:
    """The pre-hook of one decoder layer."""

    forward: PrunedForward
    number: int

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *rest = args
        hidden, kwargs = self.forward.before_layer(self.number, hidden, kwargs)
        return (hidden, *rest), kwargs
