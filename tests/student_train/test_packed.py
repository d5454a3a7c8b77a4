from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from student_train.packed import ALIGNED, pack, unpack


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7).to(torch.bfloat16),
    "uint16": torch.arange(5).to(torch.uint16),
    "bool": torch.tensor([True, False, True]),
    "a number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4, dtype=torch.int64),
    "nothing, of stride 0": torch.zeros(1, dtype=torch.int16).expand(0),
    "not contiguous": torch.arange(12, dtype=torch.int64).reshape(3, 4).T,
}


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back(name: str) -> None:
    one = TENSORS[name]
    packed = pack(Pair({"a": one}, (one, "words")))
    assert len(packed.data) % ALIGNED == 0
    back = unpack(packed)
    assert isinstance(back, Pair) and same(back.left["a"], one)
    assert same(back.right[0], one) and back.right[1] == "words"


def test_all_tensors_share_one_memory() -> None:
    packed = pack(list(TENSORS.values()))
    back = unpack(packed)
    assert all(same(one, other) for one, other in zip(back, TENSORS.values()))
    storages = {one.untyped_storage().data_ptr() for one in back}
    assert storages == {packed.data.untyped_storage().data_ptr()}
    assert len(packed.body) < 2000  # no tensor's numbers in the pickle
