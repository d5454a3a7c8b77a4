"""PyramidDrop and DART beside the equations of their released code, written out in float64 from the weights alone.

On random models, and on the shipped demo teacher with a picture and a question. One sample, no padding, one image, as those codes have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from pipelines.demo.run import TEACHER
from student_train.load_student import load_student
from student_train.pruning import Pruning
from student_train.pruning.forward import prune_vision


class Decoder:
    """A Llama or Qwen2 decoder in float64: RMS norms, rotary positions, causal attention, gated MLP."""

    def __init__(self, text: Any):
        self.text, self.layers, config = text, text.layers, text.config
        self.width = text.layers[0].self_attn.head_dim
        self.theta = config.rope_parameters["rope_theta"]

    def norm(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.text.norm, x)

    def turned(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        angles = positions[:, None].double() * self.theta ** -(torch.arange(half).double() / half)
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def heads(self, layer: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v ``[H, T, d]`` of what enters the layer, keys and values repeated for every query head."""
        attention, entered = layer.self_attn, self.norm(layer.input_layernorm, x)

        def split(map_: Any) -> torch.Tensor:
            made = entered @ map_.weight.T + (0 if map_.bias is None else map_.bias)
            return made.reshape(len(x), -1, self.width).transpose(0, 1)

        q, k, v = split(attention.q_proj), split(attention.k_proj), split(attention.v_proj)
        repeat = len(q) // len(k)
        k, v = (one.repeat_interleave(repeat, 0) for one in (self.turned(k, positions), v))
        return self.turned(q, positions), k, v

    def attention(self, q: torch.Tensor, k: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """softmax(q·k/√d) ``[H, rows, T]``, causal."""
        scores = q[:, list(rows)] @ k.transpose(1, 2) / math.sqrt(self.width)
        later = torch.arange(k.shape[1])[None] > torch.tensor(list(rows))[:, None]
        return scores.masked_fill(later, -math.inf).softmax(-1)

    def layer(self, layer: Any, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(layer, x, positions)
        read = (self.attention(q, k, range(len(x))) @ v).transpose(0, 1).flatten(1)
        x = x + read @ layer.self_attn.o_proj.weight.T
        entered, mlp = self.norm(layer.post_attention_layernorm, x), layer.mlp
        gate = torch.nn.functional.silu(entered @ mlp.gate_proj.weight.T)
        return x + (gate * (entered @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


@dataclass
class Given:
    """One sample: embeddings ``[T, D]``, where its image begins, how many tokens it has, the last prompt row of each turn."""

    x: torch.Tensor
    image_at: int
    image_tokens: int
    ends: list[int]


def pyramid_drop(decoder: Decoder, given: Given, layer_list: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """(last states, rows kept): before each listed layer, topk of its own attention map's mean over heads and turns."""
    ratios = [1.0, 0.5, 0.25, 0.125]
    x, rows, ends = given.x, torch.arange(len(given.x)), list(given.ends)
    positions = torch.arange(len(x))
    for number, layer in enumerate(decoder.layers):
        if number in layer_list:
            stage = list(layer_list).index(number)
            now, keep = (int(given.image_tokens * ratios[stage + more]) for more in (0, 1))
            q, k, _ = decoder.heads(layer, x, positions)
            image = slice(given.image_at, given.image_at + now)
            paid = decoder.attention(q, k, ends).mean(0)[:, image].mean(0)
            top = paid.topk(keep).indices.sort().values + given.image_at
            order = torch.cat([torch.arange(given.image_at), top, torch.arange(image.stop, len(x))])
            x, rows, ends = x[order], rows[order], [end - (now - keep) for end in ends]
            positions = torch.arange(len(x))
        x = decoder.layer(layer, x, positions)
    return decoder.last_norm(x), rows.tolist()


def dart(decoder: Decoder, given: Given, layer: int, ratio: float) -> tuple[torch.Tensor, list[int]]:
    """(last states, rows kept): pivots by the L1 norms of keys, for each the least alike of what is left."""
    x, positions = given.x, torch.arange(len(given.x))
    start, stop = given.image_at, given.image_at + given.image_tokens
    share = int((1 - ratio) * given.image_tokens / 8)
    keys = torch.empty(0)
    for number, module in enumerate(decoder.layers):
        if number == layer:
            norms = keys.abs().sum(dim=(0, 2))
            image = (norms[start:stop].topk(4).indices + start).tolist()
            text = (norms[stop:].topk(4).indices + stop).tolist()
            states = decoder.last_norm(x)
            left, kept = [one for one in range(start, stop) if one not in image], set(image)
            for pivot in image + text:
                unlike = -torch.cosine_similarity(states[pivot], states[left], dim=-1)
                chosen = [left[place] for place in unlike.topk(min(share, len(left))).indices.tolist()]
                kept |= set(chosen)
                left = [one for one in left if one not in chosen]
            positions = torch.tensor(sorted({*range(start), *kept, *range(stop, len(x))}))
            x = x[positions]
        _, keys, _ = decoder.heads(module, x, positions)
        x = decoder.layer(module, x, positions)
    return decoder.last_norm(x), positions.tolist()


@pytest.fixture(scope="module")
def random_model(tiny_llava: Callable[..., Any]) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """``random_model(family)`` → (model in float64, inputs of a conversation of two turns behind an image)."""

    def make(family: str) -> tuple[Any, dict[str, Any]]:
        model = tiny_llava(family, layers=8).double()
        draw = torch.Generator().manual_seed(3)
        ids = torch.randint(10, 97, (40,), generator=draw)
        ids[4:20] = 5
        pixels = torch.randn(1, 3, 16, 16, generator=draw, dtype=torch.float64)
        return model, {"input_ids": ids[None], "attention_mask": torch.ones(1, 40), "pixel_values": pixels}

    return make


@pytest.fixture(scope="module")
def demo() -> tuple[Any, dict[str, Any]]:
    model, processor = load_student(str(TEACHER), "sdpa")
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(colours).resize((96, 96), PIL.Image.Resampling.NEAREST)
    text = f"<|user|>{processor.image_token}\nwhat color is the square?<|end|><|assistant|>"
    inputs = dict(processor(text=[text], images=[picture], return_tensors="pt"))
    return model.double(), {**inputs, "pixel_values": inputs["pixel_values"].double()}


def given_of(model: Any, inputs: dict[str, Any], ends: list[int]) -> Given:
    ids = inputs["input_ids"][0]
    image = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    assert image == list(range(image[0], image[-1] + 1))
    x = model.model.language_model.embed_tokens(ids)
    x[image] = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    return Given(x, image[0], len(image), ends)


@torch.no_grad()
def check(
    model: Any, inputs: dict[str, Any], pruning: Pruning, ends: list[int] | None, equations: Callable[..., Any]
) -> int:
    """The same rows, and states that are equal to what float32 angles of the rotary embedding leave. Returns how many rows are left."""
    query_at = None if ends is None else torch.tensor([ends])
    with prune_vision(model, pruning, query_at) as pruned:
        states = model.model(**inputs, use_cache=False).last_hidden_state[0]
    last = [inputs["input_ids"].shape[1] - 1]
    expected, rows = equations(Decoder(model.model.language_model), given_of(model, inputs, ends or last))
    assert pruned.positions[0].tolist() == rows
    assert (states - expected).abs().max() <= 1e-5 * expected.abs().max()
    return len(rows)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("ends", [None, [25], [25, 33, 37]])
def test_pyramiddrop_on_random_models(random_model: Any, family: str, ends: list[int] | None) -> None:
    """Before layers 2, 4 and 6 of 8, as 8, 16 and 24 of 32; asked by the last token, by one turn, by the mean of three."""
    model, inputs = random_model(family)
    assert check(model, inputs, Pruning("pyramiddrop"), ends, lambda d, g: pyramid_drop(d, g, [2, 4, 6])) == 24 + 2


def test_every_turn_counts(random_model: Any) -> None:
    model, inputs = random_model("Qwen2")
    kept = []
    for ends in ([25, -1], [25, 33]):
        with torch.no_grad(), prune_vision(model, Pruning("pyramiddrop"), torch.tensor([ends])) as pruned:
            model.model(**inputs, use_cache=False)
        kept.append(pruned.positions[0].tolist())
    assert kept[0] != kept[1]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(("ratio", "left"), [(0.9, 4), (0.5, 12), (0.3, 12), (0.1, 12)])
def test_dart_on_random_models(random_model: Any, family: str, ratio: float, left: int) -> None:
    model, inputs = random_model(family)
    pruning = Pruning("dart", removed=ratio)
    assert check(model, inputs, pruning, None, lambda d, g: dart(d, g, 2, ratio)) == 24 + left


def test_pyramiddrop_on_the_demo_teacher(demo: Any) -> None:
    model, inputs = demo
    layers = list(Pruning("pyramiddrop").depths(len(model.model.language_model.layers)))
    left = check(model, inputs, Pruning("pyramiddrop"), None, lambda d, g: pyramid_drop(d, g, layers))
    assert left == int((inputs["input_ids"] != model.config.image_token_id).sum()) + 144 // 8


@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_dart_on_the_demo_teacher(demo: Any, ratio: float) -> None:
    model, inputs = demo
    check(model, inputs, Pruning("dart", layer=2, removed=ratio), None, lambda d, g: dart(d, g, 2, ratio))
