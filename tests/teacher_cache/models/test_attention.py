"""Attention computed apart is the attention that the layer's own eager kernel gives, family by family, padding and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.models.attention import check_attention, layer_attention, layer_keys
from tests.close import assert_all_close

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def text_model(family: str, **changes: Any) -> Any:
    """A tiny text model, two key heads for four query heads, eager."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    window = {"sliding_window": None} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **window, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layer_inputs(model: Any, number: int, **inputs: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], Any]:
    """(input of layer ``number``, its position embeddings, the model's own attentions by layer)."""
    caught: dict[str, Any] = {}

    def catch(layer: Any, args: Any, kwargs: Any) -> None:
        caught.update(hidden=args[0], position_embeddings=kwargs["position_embeddings"])

    handle = model.layers[number].register_forward_pre_hook(catch, with_kwargs=True)
    attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
    handle.remove()
    return caught["hidden"], caught["position_embeddings"], attentions


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [0, 2])
def test_rows_are_the_eager_ones(family: str, number: int, padded: dict[str, torch.Tensor]) -> None:
    model = text_model(family)
    hidden, positions, attentions = layer_inputs(model, number, **padded)
    rows = torch.tensor([[10, 3, 0], [6, 2, 0], [10, 4, 7]])
    got = layer_attention(model.layers[number], hidden, positions, rows, padded["attention_mask"].bool())
    assert got.shape == (3, 4, 3, 11) and got.dtype == torch.float32
    for sample in range(3):
        expected = attentions[number][sample][:, rows[sample]]
        torch.testing.assert_close(got[sample], expected, atol=1e-6, rtol=1e-5)
    assert got[1, :, :, 7:].abs().max() == 0 and got[2, :, :, :4].abs().max() == 0


def test_a_query_that_sees_only_padding_pays_nothing(padded: dict[str, torch.Tensor]) -> None:
    model = text_model("Qwen2")
    hidden, positions, _ = layer_inputs(model, 0, **padded)
    got = layer_attention(
        model.layers[0], hidden, positions, torch.tensor([[0], [0], [2]]), padded["attention_mask"].bool()
    )
    assert got[2].abs().max() == 0 and torch.isfinite(got).all()


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradients_are_the_eager_ones(family: str) -> None:
    """Of the input and of every weight that attention depends on."""
    model = text_model(family)
    ids = torch.arange(9)[None]
    hidden, positions, _ = layer_inputs(model, 1, input_ids=ids)
    layer, leaf = model.layers[1], hidden.detach().requires_grad_()
    pull = torch.randn(1, 4, 2, 9)
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    _, eager = layer.self_attn(layer.input_layernorm(leaf), position_embeddings=positions, attention_mask=causal)
    weights = [
        p for n, p in layer.named_parameters() if n.startswith(("self_attn.q", "self_attn.k", "input_layernorm"))
    ]
    expected = torch.autograd.grad((eager[:, :, [4, 8]] * pull).sum(), [leaf, *weights])
    got = layer_attention(layer, leaf, positions, torch.tensor([[4, 8]]), torch.ones(1, 9, dtype=torch.bool))
    assert_all_close(torch.autograd.grad((got * pull).sum(), [leaf, *weights]), expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_that_the_cache_holds(family: str) -> None:
    model = text_model(family)
    ids = torch.arange(10).reshape(2, 5)
    hidden, positions, _ = layer_inputs(model, 1, input_ids=ids)
    held = model(input_ids=ids, use_cache=True).past_key_values.layers[1].keys
    torch.testing.assert_close(layer_keys(model.layers[1], hidden, positions), held, atol=1e-5, rtol=1e-5)


def test_under_autocast_the_softmax_stays_float32(padded: dict[str, torch.Tensor]) -> None:
    """Rounded projections, exact scores: probabilities still sum to 1 within float32."""
    model = text_model("Qwen3")
    hidden, positions, attentions = layer_inputs(model, 1, **padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer_attention(
            model.layers[1], hidden, positions, torch.tensor([[10], [6], [10]]), padded["attention_mask"].bool()
        )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(3, 4, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(got[0, :, 0], attentions[1][0, :, 10], atol=0.05, rtol=0)


def of_vision_family(name: str, text: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        config = getattr(transformers, name)(
            text_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"num_key_value_heads": 2, "vocab_size": 40, "head_dim": 16},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "intermediate_size": 16,
            },
        )
        return getattr(transformers, text)._from_config(config.get_text_config()).layers[0]

    return make


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (of_vision_family("Qwen2_5_VLConfig", "Qwen2_5_VLTextModel"), "Qwen2_5_VLAttention"),
        (of_vision_family("Qwen3VLConfig", "Qwen3VLTextModel"), "Qwen3VLTextAttention"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_other_layers_are_refused_by_name(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(CompatibilityError, match=f"attention of {name} cannot be computed apart"):
        check_attention(make())


def test_windows_and_several_positions_are_refused() -> None:
    with pytest.raises(CompatibilityError, match="sliding window"):
        check_attention(text_model("Mistral", sliding_window=4).layers[0])
    layer = text_model("Llama").layers[0]
    three = (torch.zeros(3, 1, 5, 8), torch.zeros(3, 1, 5, 8))
    with pytest.raises(CompatibilityError, match="M-RoPE"):
        layer_keys(layer, torch.zeros(1, 5, 32), three)
