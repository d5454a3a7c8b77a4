"""The student's forward, to the rows that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from student_train.compression import first_tokens
from student_train.dataset import TrainBatch
from student_train.load_student import module_group
from student_train.losses.terms import FIRST_LAYER, StudentRows
from student_train.pruning import Descending, Pruning
from student_train.pruning.forward import prune_vision
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.families import family_of
from teacher_cache.models.head import head_logits
from teacher_cache.models.head_form import check_rows, head_form
from teacher_cache.models.kind import decoder_of
from teacher_cache.models.text_vision import layer_inputs, text_vision_attention
from teacher_cache.preparing.batch import Batch, keep_vision
from teacher_cache.records import TextTokens


class RowForward(nn.Module):
    """One forward that returns the hidden states of the wanted rows (and so is what DDP wraps).

    The head product is left to the losses, which take it chunk by chunk. That it is the model's own logits is checked on the first batch.

    Args:
        maps: learned maps of the method, trained beside the student and no part of it.
    Attributes:
        form: what the model makes of W·h.

    Raises:
        CompatibilityError: its logits are made in another way than is known here.
    """

    model: Any  # a transformers model, whose methods no type checker follows

    def __init__(self, model: nn.Module, maps: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.model = model
        self.maps = nn.ModuleDict(maps or {})
        self.form = head_form(model)
        self._head_checked = False
        self._gram: tuple[tuple[int, int | None], torch.Tensor] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The head's parameter ``[V, D]``."""
        return self.model.get_output_embeddings().weight

    @property
    def head(self) -> torch.Tensor:
        """``[V, D]``, its scale in it: the parameter itself, or (of a model that scales its logits) made of it with its gradient."""
        return self.form.weight(self.weight)

    def forward(
        self,
        batch: Batch,
        kinds: Sequence[str],
        pruning: Pruning | Descending | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Post-final-norm hidden states ``[R, D]`` by row kind, in the compute dtype.

        Kinds of the first layer: ``features``, its input at the vision rows, and ``attention``, a list of one map a sample.

        Args:
            pruning: of vision tokens inside the language model (``student_train.pruning``), None: all stay. Random choices are the
                global generator's, which the trainer seeds by step.
            how: further keywords of ``prune_vision``, where not as training has them.
        """
        self._expect(batch)
        if not self._head_checked:
            self._check_head(batch)
        first = FIRST_LAYER & set(kinds)
        with layer_inputs(self.model, [0] if first else []) as seen:
            states, rows = self._states(batch, pruning, how or {})
        if torch.is_autocast_enabled(states.device.type):
            # The residual stream stays float32 under autocast; the head product, outside of it, must be in the compute dtype too.
            states = states.to(torch.get_autocast_dtype(states.device.type))
        assert pruning is None or not {"vision", *FIRST_LAYER} & set(kinds), "rows of vision tokens that may be removed"
        places = {kind: rows(batch.rows[kind]) for kind in kinds if kind not in FIRST_LAYER}
        if pruning is not None:
            check_there(batch, places)
        found: dict[str, Any] = {kind: states[at] for kind, at in places.items()}
        if "features" in first:
            found["features"] = seen.hidden[0].flatten(0, 1)[batch.rows["vision"]]
        if "attention" in first:
            found["attention"] = text_vision_attention(self.model, 0, seen, batch)
        return found

    def _states(
        self, batch: Batch, pruning: Pruning | Descending | None, how: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(hidden states ``[rows, D]``, what turns rows of the batch into rows of them)"""
        if pruning is None:
            states = decoder_of(self.model)(**self._inputs(batch), use_cache=False).last_hidden_state
            return states.flatten(0, 1), lambda rows: rows
        layers = self.model.config.get_text_config().num_hidden_layers
        with prune_vision(self.model, pruning.at(layers), **{"query_at": asking_rows(batch), **how}) as pruned:
            states = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1), pruned.rows

    def _inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Of the decoder. Positions of packed samples are the family's."""
        if "position_ids" not in batch.inputs:
            return batch.inputs
        decoder = decoder_of(self.model)
        return {**batch.inputs, "position_ids": family_of(self.model.config).packed_positions(decoder, batch)}

    @torch.no_grad()
    def _check_head(self, batch: Batch) -> None:
        """CompatibilityError where the losses would see other logits than the whole model says."""
        with in_eval(self.model):  # dropout says something else every time
            inputs = self._inputs(batch)
            states = decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state
            if torch.is_autocast_enabled(states.device.type):
                states = states.to(torch.get_autocast_dtype(states.device.type))
            head = self.head.to(states.dtype)
            first, count = batch.spans[0]
            at = torch.arange(first + count, device=states.device)[-min(count, 4) :]
            self._head_checked = check_rows(
                self.model, inputs, states, lambda rows: head_logits(rows, head, self.form.cap), len(head), at
            )

    def draw(self, one: TrainBatch, seed: int, step: int) -> TrainBatch:
        """The micro-batch as this step trains it: an elastic compressor keeps as many vision tokens of every image as the step draws,
        or, while the language model is frozen, all that it can."""
        if not hasattr(self.projector, "draw") or "pixel_values" not in one.batch.inputs or not self._reads():
            return one
        keep = self.projector.draw(seed, step)
        pad_id = self.model.config.get_text_config().pad_token_id or 0
        layouts = tuple(first_tokens(layout, keep) for layout in one.student_layouts)
        return replace(one, batch=keep_vision(one.batch, keep, pad_id), student_layouts=layouts)

    def _reads(self) -> bool:
        """Whether the language model trains."""
        names = (name for name, one in self.model.named_parameters() if one.requires_grad)
        return any(module_group(name, self.model.config) == "language_model" for name in names)

    @property
    def projector(self) -> Any:
        return getattr(decoder_of(self.model), "multi_modal_projector", None)

    def _expect(self, batch: Batch) -> None:
        """An elastic compressor gives as many tokens an image as the batch has places for."""
        if hasattr(self.projector, "keep") and "pixel_values" in batch.inputs:
            self.projector.keep = sum(batch.counts["vision"]) // len(batch.inputs["pixel_values"])

    def rows(self, hidden: dict[str, Any], batch: Batch, text: Sequence[TextTokens] = ()) -> StudentRows:
        """The student's side of a micro-batch; text: as the student reads it."""
        gram = cache(self.head_gram)  # one graph for all samples of the micro-batch
        maps, attention = dict(self.maps.items()), hidden.get("attention")
        head, cap = self.head, self.form.cap
        return StudentRows(hidden, batch.counts, head, batch.labels, gram, maps, text, attention, cap)

    def head_gram(self, vocabulary: int | None = None) -> torch.Tensor:
        """WᵀW float32 ``[D, D]`` over the vocabulary: with gradient where the head is trained, made once where it is frozen.

        CompatibilityError where logits are capped: their Gram matrix does not follow from it.
        """
        if self.form.cap is not None:
            raise CompatibilityError(
                f"{type(self.model).__name__} caps its logits softly (at {self.form.cap:g}): relations of raw vision logits "
                "need a linear head; use a method or knobs without them, or another student"
            )
        head = self.head[:vocabulary].to(torch.float32)
        if head.requires_grad:
            return head.T @ head
        made_from = (self.weight._version, vocabulary)
        if self._gram is None or self._gram[0] != made_from:
            self._gram = (made_from, head.T @ head)
        return self._gram[1]


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Every module's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_there(batch: Batch, places: Mapping[str, torch.Tensor]) -> None:
    """KdcliError naming the row where a token that predicts another one was removed (-1): it would be read as the last state of all."""
    for kind, at in places.items():
        if bool((at < 0).any()):
            sample = int(torch.repeat_interleave(torch.tensor(batch.counts[kind]))[(at < 0).nonzero()[0, 0].cpu()])
            raise KdcliError(
                f"row {batch.keys[sample]}: a vision token that predicts a word of the answer was removed (an image is inside the "
                "answer): leave such rows out, or use a method that removes no tokens"
            )


def asking_rows(batch: Batch) -> torch.Tensor:
    """int64 ``[B, Q]``: the columns of each sample's last prompt tokens, which predict the first response token of each turn; -1 where it
    has fewer turns.

    The first sees the prompt only: responses must not choose the vision tokens that they are then predicted from.
    """
    mask = batch.inputs["attention_mask"]
    columns = mask.cumsum(dim=1).argmax(dim=1)  # the last token, where a sample has no response
    asking = []
    for sample, rows in enumerate(batch.rows["response"].split(list(batch.counts["response"]))):
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows.diff() != 1
        asking.append(rows[first] - sample * mask.shape[1] if len(rows) else columns[sample : sample + 1])
    return torch.nn.utils.rnn.pad_sequence(asking, batch_first=True, padding_value=-1)
