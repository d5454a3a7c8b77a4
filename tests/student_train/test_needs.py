"""Which fields serve which needs, alone and together."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.needs import Need, serve
from teacher_cache.errors import CompatibilityError

SKETCH = {"codec": "sketch"}
STANDARD: dict[str, dict[str, Any]] = {
    "response_topk": {"k": 8},
    "vision_topk": {"k": 8},
    "response_hidden": SKETCH,
    "vision_hidden": SKETCH,
    "affinity": {"layout": "factored"},
}
EM_KD = (
    Need("response_logits", "reverse"),
    Need("vision_logits", "reverse"),
    Need("vision_raw_logits"),
    Need("vision_text_affinity"),
)
LLAVA_KD = (Need("response_logits"), Need("vision_logits"), Need("vision_relation"))


@pytest.mark.parametrize("needs", [LLAVA_KD, EM_KD, (Need("response_logits"), Need("response_logits", "reverse"))])
def test_the_standard_profile_serves_with_nothing_lost(needs: tuple[Need, ...]) -> None:
    served = serve(needs, STANDARD, "m", "CACHE")
    assert set(served.fields) == {need.what for need in needs} and served.notes == ()


def test_one_what_in_two_directions_is_served_by_what_serves_both() -> None:
    both = [Need("response_logits"), Need("response_logits", "reverse")]
    have = {"response_topk": {"k": 8}, "response_sampled": {}}
    assert serve(both[:1], {"response_sampled": {}}, "m", "C").fields == {"response_logits": ("response_sampled",)}
    with pytest.raises(CompatibilityError, match=r"needs response_logits .reverse."):
        serve(both, {"response_sampled": {}}, "m", "C")
    served = serve(both, have, "m", "C")
    assert served.fields == {"response_logits": ("response_topk",)}
    assert "(forward) and response_logits (reverse) served by response_topk" in served.notes[0]


def test_two_temperatures_need_hidden_states() -> None:
    both = [Need("vision_logits"), Need("vision_logits", temperature=2.0)]
    with pytest.raises(CompatibilityError, match=r"T=2.*vision_topk: valid at temperature 1 only"):
        serve(both, {"vision_topk": {"k": 8}}, "m", "C")
    assert serve(both, {"vision_hidden": {"codec": "bf16"}}, "m", "C").notes == ()
    assert "approximate" in serve(both, STANDARD, "m", "C").notes[0]


def test_what_needs_hidden_states_themselves_is_not_served_by_a_head() -> None:
    with pytest.raises(CompatibilityError, match="cache add-field C --field vision_hidden"):
        serve([Need("vision_raw_logits")], {"vision_topk": {"k": 8}}, "m", "C")


def test_attention_of_another_layer_is_said() -> None:
    served = serve([Need("text_vision_attention")], {"attention": {"layer": 3}}, "align-kd", "there")
    assert served.names == ["attention"] and "of its layer 3" in " ".join(served.notes)
    assert not serve([Need("text_vision_attention")], {"attention": {"layer": 0}}, "align-kd", "there").notes
