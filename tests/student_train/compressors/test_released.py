"""MQT and TokenPacker: weights in the layout of their released files load, and give what the released equations give.

Values are random, names and shapes those of the files (CLIP-L's 24×24 patches of width 1024; a narrow language model). The equations are
written out in float64 from that dictionary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from student_train.compressors import CompressorSpec, Site, compressor_module
from student_train.compressors.attention import CrossAttention
from teacher_cache.errors import CompatibilityError
from tests.close import assert_close

SIDE, WIDTH, TEXT = 24, 1024, 48
ATTENTION = {
    "in_proj_weight": (3 * WIDTH, WIDTH),
    "in_proj_bias": (3 * WIDTH,),
    "out_proj.weight": (WIDTH, WIDTH),
    "out_proj.bias": (WIDTH,),
}
NORM = {"weight": (WIDTH,), "bias": (WIDTH,)}
MQT_SHAPES = {
    "pos_embed": (256, WIDTH),
    "query": (256, WIDTH),
    "proj": (WIDTH, TEXT),
    **{f"attn.{name}": shape for name, shape in ATTENTION.items()},
    **{f"ln_{which}.{name}": shape for which in "qkv" for name, shape in NORM.items()},
}
TOKENPACKER_SHAPES = {
    "q_proj_1.weight": (WIDTH, WIDTH),
    **{f"{which}_proj_1.0.weight": (WIDTH, 4 * WIDTH) for which in "kv"},
    **{f"{which}_proj_1.0.bias": (WIDTH,) for which in "kv"},
    **{f"{which}_proj_1.2.weight": (WIDTH, WIDTH) for which in "kv"},
    **{f"{which}_proj_1.2.bias": (WIDTH,) for which in "kv"},
    **{f"ln_{which}_1.{name}": shape for which in "qkv" for name, shape in NORM.items()},
    **{f"clip_attn.{name}": shape for name, shape in ATTENTION.items()},
    "mlp.0.weight": (TEXT, WIDTH),
    "mlp.0.bias": (TEXT,),
    "mlp.2.weight": (TEXT, TEXT),
    "mlp.2.bias": (TEXT,),
}
Weights = dict[str, torch.Tensor]


def values(shapes: dict[str, tuple[int, ...]]) -> Weights:
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def places() -> torch.Tensor:
    """The 16×16 table ``[256, 1024]``, number by number: the column's sines and cosines, then the row's."""
    quarter = WIDTH // 4
    waves = [10_000.0 ** -(i / quarter) for i in range(quarter)]
    of_cell = [[math.sin(cell * w) for w in waves] + [math.cos(cell * w) for w in waves] for cell in range(16)]
    return torch.tensor([of_cell[x] + of_cell[y] for y in range(16) for x in range(16)], dtype=torch.float64)


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w: Weights, name: str, heads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[..., Q, D]``: each head of D / heads for itself."""
    maps = zip(w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3), (q, k, v))
    q, k, v = (x @ matrix.T + bias for matrix, bias, x in maps)
    read, size = [], WIDTH // heads
    for part in (slice(head * size, (head + 1) * size) for head in range(heads)):
        read.append((q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v[..., part])
    return torch.cat(read, -1) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def mqt(w: Weights, features: torch.Tensor, keep: int) -> torch.Tensor:
    table = places()
    image = table.reshape(1, 16, 16, WIDTH).permute(0, 3, 1, 2)
    wide = F.interpolate(image, size=(SIDE, SIDE), mode="bicubic", align_corners=False)[0].flatten(1).T
    queries = norm(w, "ln_q", w["query"][:keep] + table[:keep])
    read = attend(w, "attn", 16, queries, norm(w, "ln_k", wide), norm(w, "ln_v", features))
    return read @ w["proj"]


def tokenpacker(w: Weights, features: torch.Tensor, scale: int = 2) -> torch.Tensor:
    """features ``[N, 576, 4·1024]``, the last 1024 those of the single level."""

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]) @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]

    grid = features[..., -WIDTH:].reshape(-1, SIDE, SIDE, WIDTH)
    coarse = torch.stack(  # bilinear at half the size is the mean of two by two
        [grid[:, y : y + 2, x : x + 2].mean((1, 2)) for y in range(0, SIDE, scale) for x in range(0, SIDE, scale)], 1
    )
    queries = norm(w, "ln_q_1", coarse @ w["q_proj_1.weight"].T)
    keys, values = (norm(w, f"ln_{one}_1", mlp(f"{one}_proj_1", features)) for one in "kv")
    regions = [
        [(y + dy) * SIDE + x + dx for dy in range(scale) for dx in range(scale)]
        for y in range(0, SIDE, scale)
        for x in range(0, SIDE, scale)
    ]
    read = attend(w, "clip_attn", 8, queries[:, :, None], keys[:, regions], values[:, regions])
    return mlp("mlp", read[:, :, 0])


def build(name: str, layers: tuple[int, ...] = ()) -> Any:
    module, site = compressor_module(name), Site(SIDE, WIDTH, TEXT, (-2,), 24)
    projector = torch.nn.Module()
    projector.linear_1, projector.act, projector.linear_2 = (
        torch.nn.Linear(WIDTH, TEXT),
        torch.nn.GELU(),
        torch.nn.Linear(TEXT, TEXT),
    )
    return module.build(module.settle(CompressorSpec(name, 144, layers), site), site, projector).double()


@pytest.mark.parametrize("place", ["", "model.query_abstractor."])
def test_mqt(place: str) -> None:
    weights = values(MQT_SHAPES) | {"pos_embed": places()}
    one = build("mqt")
    assert one.attention.heads == 16
    kept = {place + name: tensor for name, tensor in weights.items()} | {place + "pos_embed": places().half()}
    one.load_state_dict(kept)
    features = torch.randn(2, SIDE**2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for keep in (256, 2):
        one.keep = keep
        assert_close(one(features), mqt(weights, features, keep), 1e-10)
    one.load_state_dict(one.state_dict())  # its own names are left as they are


def test_mqt_of_other_places_is_refused() -> None:
    with pytest.raises(CompatibilityError, match="other positions than those of 256 queries"):
        build("mqt").load_state_dict(values(MQT_SHAPES))


@pytest.mark.parametrize("place", ["", "model.mm_projector."])
def test_tokenpacker(place: str) -> None:
    weights = values(TOKENPACKER_SHAPES)
    one = build("tokenpacker")
    assert one.attention.heads == 8
    one.load_state_dict({place + name: tensor for name, tensor in weights.items()})
    features = torch.randn(1, SIDE**2, 4 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(one(features), tokenpacker(weights, features), 1e-10)
    one.load_state_dict(one.state_dict())


def test_weights_of_something_else_are_still_told_apart() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*ln_x"):
        build("mqt").load_state_dict(values(MQT_SHAPES) | {"pos_embed": places(), "ln_x.weight": torch.ones(3)})


@torch.no_grad()
def test_fresh_weights_are_drawn_as_the_released_codes_draw_them() -> None:
    """Deviations of 0.02 (a truncation at ±2 cuts nothing), Xavier's for torch's one matrix of an attention, d^−½ for MQT's last map."""
    torch.manual_seed(0)
    own: Any = torch.nn.MultiheadAttention(WIDTH, 8).in_proj_weight
    one, packer = build("mqt").float(), build("tokenpacker").float()
    for attention in (one.attention, packer.attention):
        for projection in (attention.query, attention.key, attention.value):
            assert float(projection.weight.std()) == pytest.approx(float(own.std()), rel=0.01)
            assert float(projection.weight.abs().max()) == pytest.approx(float(own.abs().max()), rel=0.01)
            assert not projection.bias.any()
    small = [
        one.queries,
        one.attention.out.weight,
        packer.attention.out.weight,
        packer.query.weight,
        packer.key[0].weight,
    ]
    for weight in small:
        assert float(weight.std()) == pytest.approx(0.02, rel=0.01) and weight.abs().max() > 0.07
    assert float(one.out.weight.std()) == pytest.approx(TEXT**-0.5, rel=0.02)


def test_heads_divide_the_width() -> None:
    found = SimpleNamespace(**{f"w{width}": CrossAttention(width, 64).heads for width in (1024, 1152, 48, 100)})
    assert (found.w1024, found.w1152, found.w48, found.w100) == (16, 18, 1, 1)
