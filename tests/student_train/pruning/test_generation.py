"""Generation with a cache whose layers hold different lengths is the pruned forward, computed anew for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from student_train.pruning import Pruning, operator_modules
from student_train.pruning.forward import prune_vision
from teacher_cache.errors import CompatibilityError
from tests.student_train.pruning.plain import pruned_states

NEW = 6
OPERATORS = sorted(operator_modules())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def generate(
    model: Any, inputs: dict[str, Any], pruning: Pruning | None, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(tokens ``[B, NEW]``, logits ``[B, NEW, V]``, cache)"""
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, **arguments}
    if pruning is None:
        out = model.generate(**inputs, **settings)
    else:
        with prune_vision(model, pruning, generator=seeded()):
            out = model.generate(**inputs, **settings)
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1), out.past_key_values


@torch.no_grad()
def token_by_token(
    model: Any, ids: torch.Tensor, pixels: torch.Tensor, images: int, pruning: Pruning, draw: Any
) -> tuple[Any, Any]:
    """Greedy tokens and logits: no cache, no batch, no padding; the prompt's last token ranks, as when it was all there was."""
    asking, said, logits = len(ids) - 1, [], []
    before = draw.get_state()
    for _ in range(NEW):
        draw.set_state(before)
        states, _ = pruned_states(model, ids, {"pixel_values": pixels}, pruning, asking, images, draw)
        logits.append(model.lm_head(states[-1]))
        said.append(int(logits[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1]])])
    return torch.tensor(said), torch.stack(logits)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy_tokens_and_logits(
    tiny_llava: Any, samples: Any, pictures: Any, batch_of: Any, operator: str, implementation: str
) -> None:
    """A left-padded batch with every kind of row."""
    pruning = Pruning(operator, layer=2, keep=4)
    tokens, logits, cache = generate(tiny_llava(implementation=implementation), batch_of(left=True), pruning)
    model, draw = tiny_llava(implementation="eager"), seeded()
    for sample, ((ids, images), pixels) in enumerate(zip(samples, pictures)):
        said, expected = token_by_token(model, ids, pixels, images, pruning, draw)
        torch.testing.assert_close(logits[sample], expected, atol=5e-4, rtol=1e-4)
        assert torch.equal(tokens[sample], said)
    full = batch_of()["input_ids"].shape[1] + NEW - 1
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths[:2] == [full, full] and lengths[-1] < full - 20 and lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("left", [True, False])
def test_nothing_removed_generates_what_the_model_does(
    tiny_llava: Any, batch_of: Any, operator: str, left: bool
) -> None:
    model = tiny_llava()
    inputs = batch_of(left=True) if left else batch_of(which=[0])
    tokens, logits, _ = generate(model, inputs, None)
    for pruning in (Pruning(operator, removed=0.0), Pruning(operator, keep=16), Pruning(operator, layer=6, keep=1)):
        ours, same, _ = generate(model, inputs, pruning)
        assert torch.equal(ours, tokens) and torch.equal(same, logits)


def test_one_row_without_padding(tiny_llava: Any, samples: Any, pictures: Any, batch_of: Any) -> None:
    """No mask is needed anywhere: sdpa runs without one."""
    pruning = Pruning("fastv", layer=3, keep=5)
    _, logits, _ = generate(tiny_llava(), batch_of(which=[1]), pruning)
    _, expected = token_by_token(tiny_llava(implementation="eager"), samples[1][0], pictures[1], 1, pruning, seeded())
    torch.testing.assert_close(logits[0], expected, atol=5e-4, rtol=1e-4)


def test_without_a_cache_every_step_is_a_whole_forward(tiny_llava: Any, samples: Any, batch_of: Any) -> None:
    """Equal prompts of 22 and 22 tokens, one with an image: the last column stays the last token of both."""
    inputs = batch_of(which=[1, 2])
    ids = inputs["input_ids"].clone()
    ids[1] = torch.arange(20, 20 + ids.shape[1])
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pruning = Pruning("dart", layer=2, keep=4)
    _, cached, _ = generate(tiny_llava(), inputs, pruning)
    _, anew, _ = generate(tiny_llava(), inputs, pruning, use_cache=False)
    torch.testing.assert_close(cached[:, 0], anew[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached[1], anew[1], atol=5e-4, rtol=1e-4)


def test_a_static_cache_is_refused(tiny_llava: Any, batch_of: Any) -> None:
    with pytest.raises(CompatibilityError, match="grows by layer, not StaticCache"):
        generate(
            tiny_llava(),
            batch_of(left=True),
            Pruning("random", keep=4),
            cache_implementation="static",
            disable_compile=True,
        )
