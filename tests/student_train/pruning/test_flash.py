"""The flash path of transformers on a CPU: its own unpadding and its own mask rules, around a kernel written in plain torch."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch

from student_train.pruning import Pruning
from student_train.pruning.forward import prune_vision
from student_train.pruning.masks import attention_mask
from tests.close import assert_close

PRUNING = Pruning("fastv", layer=2, keep=4)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """One sequence ``[rows, heads, d]``; the last query row sees every key, as flash attention aligns its causal mask."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float, **_: Any
) -> torch.Tensor:
    return torch.stack([attend(*one, causal, softmax_scale) for one in zip(q, k, v)])


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    **_: Any,
) -> torch.Tensor:
    rows, columns = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    pieces = zip(q.split(rows), k.split(columns), v.split(columns), strict=True)
    return torch.cat([attend(*one, causal, softmax_scale) for one in pieces])


@pytest.fixture
def flash_llava(monkeypatch: pytest.MonkeyPatch, tiny_llava: Any) -> Any:
    """The tiny LLaVA whose text layers go through transformers' flash attention."""
    import transformers.modeling_flash_attention_utils as utils

    process = partial(utils._process_flash_attention_kwargs, supports_mapping=defaultdict(bool))
    kernels = (flash, flash_varlen, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (kernels, (process, dict)))
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("which", [[0], [0, 1, 2, 3, 4]])
@torch.no_grad()
def test_states_are_those_of_sdpa(flash_llava: Any, tiny_llava: Any, batch_of: Any, which: list[int]) -> None:
    """One row alone has gaps in its positions, which the flash path must not take for packed sequences."""
    results = []
    for model in (flash_llava, tiny_llava()):
        with prune_vision(model, PRUNING) as pruned:
            results.append(model.model(**batch_of(which=which), use_cache=False).last_hidden_state)
        there = pruned.positions >= 0
    assert_close(results[0][there], results[1][there], 5e-5)


@pytest.mark.parametrize("which", [[0], [0, 1, 2, 3, 4]])
def test_generation_is_that_of_sdpa(flash_llava: Any, tiny_llava: Any, batch_of: Any, which: list[int]) -> None:
    given = {
        "do_sample": False,
        "max_new_tokens": 5,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    results = []
    for model in (flash_llava, tiny_llava()):
        with prune_vision(model, PRUNING):
            results.append(torch.stack(model.generate(**batch_of(left=True, which=which), **given).logits))
    torch.testing.assert_close(*results, atol=5e-4, rtol=1e-4)


def test_masks() -> None:
    """Two samples of three keys, the second with its first key padding."""
    valid = torch.tensor([[True, True, True], [False, True, True]])
    assert torch.equal(attention_mask(valid, 3, "flash_attention_2", torch.float32), valid)
    assert attention_mask(valid[:1], 3, "flash_attention_2", torch.float32) is None
    assert attention_mask(valid[:1], 3, "sdpa", torch.float32) is None
    assert attention_mask(valid[:1], 1, "sdpa", torch.float32) is None
    seen = attention_mask(valid, 3, "sdpa", torch.float32)
    assert seen[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert attention_mask(valid[:1], 2, "sdpa", torch.float32)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    added = attention_mask(valid, 1, "eager", torch.bfloat16)
    assert added.dtype == torch.bfloat16 and (added[:, 0, 0] == 0).tolist() == valid.tolist()
    assert (attention_mask(valid[:1], 3, "eager", torch.float32)[0, 0] == 0).int().sum() == 6
