"""The losses of the demo's trainings: words of patches, attributes of patches, answers, words at the vision tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from benchmarks.demo_training.model import normalised, vision_embeddings
from benchmarks.demo_training.patch_labels import ATTRIBUTES, PATCH_WORDS, WORD_INDEX
from benchmarks.demo_training.stream import IGNORED
from benchmarks.demo_training.tokenizer import load_tokenizer


def patch_word_ids() -> torch.Tensor:
    """Token id of every patch word ``[W]``: each is one token."""
    ids = [load_tokenizer().encode(word, add_special_tokens=False) for word in PATCH_WORDS]
    assert all(len(i) == 1 for i in ids), "a patch word is not a single token"
    return torch.tensor([i[0] for i in ids])


def soft_word_loss(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the uniform distribution over a patch's words: ``logits [R, W]``, ``words [R, 5]`` -> ``[R]``"""
    valid = words >= 0
    picked = logits.gather(1, words.clamp(min=0)) * valid
    return logits.logsumexp(1) - picked.sum(1) / valid.sum(1)


class AttributeHeads(nn.Module):
    """Throw-away linear heads on the projected vision tokens: place, counts, values (see ``ATTRIBUTES``)."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in ATTRIBUTES.items()})

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """``features [N, 144, D]``, ``labels [N, 144, A]`` -> mean loss."""
        losses = []
        for i, head in enumerate(self.heads.values()):
            chosen = labels[..., i] >= 0
            if chosen.any():
                losses.append(F.cross_entropy(head(features[chosen]).float(), labels[..., i][chosen]))
        return torch.stack(losses).mean()


def patch_weights(words: torch.Tensor) -> torch.Tensor:
    """``[N, 144]``: background is most of every picture and soon learned, so it counts a tenth."""
    return torch.where(words[..., 0] == WORD_INDEX["background"], 0.1, 1.0)


def tower_loss(model: LlavaForConditionalGeneration, heads: AttributeHeads, batch: dict, word_ids: torch.Tensor,
               attribute_weight: float) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """Phase A: every projected patch says its words through the (tied) LM head's rows of those words."""
    features = vision_embeddings(model, normalised(batch["pixels"]).to(model.dtype))
    logits = F.linear(features, model.lm_head.weight[word_ids]).float()
    words = batch["words"]
    weights = patch_weights(words)
    per_patch = soft_word_loss(logits.flatten(0, 1), words.flatten(0, 1)).view_as(weights)
    word = (per_patch * weights).sum() / weights.sum()
    right = (words == logits.argmax(-1, keepdim=True)).any(-1)[weights == 1].float().mean()
    parts = {"word": word.item(), "patch_right": right.item()}
    if not attribute_weight:
        return word, parts
    attribute = heads(features, batch["attributes"])
    return word + attribute_weight * attribute, {**parts, "attribute": attribute.item()}


def answer_loss(model: LlavaForConditionalGeneration, batch: dict, word_ids: torch.Tensor, vision_weight: float,
                vision_rows: int) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """Phase B: next-token loss on answers, plus patch words at a sample of the vision tokens (unshifted)."""
    pixels = normalised(batch["pixels"]).to(model.dtype) if "pixels" in batch else None
    # Without a mask of its own a row needs none: it is padded on the right, where a causal model never looks.
    layout = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    hidden = model.model(input_ids=batch["input_ids"], pixel_values=pixels, use_cache=False, **layout).last_hidden_state
    answers = batch["targets"] != IGNORED
    logits = model.lm_head(hidden[answers]).float()
    answer = F.cross_entropy(logits, batch["targets"][answers])
    parts = {"answer": answer.item()}
    if pixels is None or not vision_weight:
        return answer, parts
    words = batch["words"]
    weights = patch_weights(words)
    # A random sample that prefers drawn patches, so that background does not fill it.
    preferred = (weights == 1) & (torch.rand_like(weights) < 0.7)
    chosen = (torch.rand_like(weights) + 2 * preferred).topk(vision_rows).indices
    vision = hidden[batch["input_ids"] == model.config.image_token_id].view(*weights.shape, -1)
    picked = vision.gather(1, chosen[..., None].expand(-1, -1, vision.shape[-1])).flatten(0, 1)
    targets = words.gather(1, chosen[..., None].expand(-1, -1, words.shape[-1])).flatten(0, 1)
    targets = torch.where(targets >= 0, word_ids[targets.clamp(min=0)], -1)
    word = soft_word_loss(model.lm_head(picked).float(), targets).mean()
    return answer + vision_weight * word, {**parts, "vision": word.item()}


def lone_tower_loss(tower: nn.Module, head: nn.Linear, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """A vision tower that has met no language model: patch words through a throw-away linear head ``[D_vision, W]``."""
    pixels = normalised(batch["pixels"]).to(head.weight.dtype)
    features = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states[-1]
    words, logits = batch["words"], head(features).float()
    weights = patch_weights(words)
    per_patch = soft_word_loss(logits.flatten(0, 1), words.flatten(0, 1)).view_as(weights)
    right = (words == logits.argmax(-1, keepdim=True)).any(-1)[weights == 1].float().mean()
    loss = (per_patch * weights).sum() / weights.sum()
    return loss, {"word": loss.item(), "patch_right": right.item()}


def language_loss(
    model: LlavaForConditionalGeneration, batch: dict, pad_id: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Plain language modelling of text rows: every next token, questions included."""
    ids = batch["input_ids"]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    real = ids[:, 1:] != pad_id
    loss = F.cross_entropy(model.lm_head(hidden[real]).float(), ids[:, 1:][real])
    return loss, {"language": loss.item()}
