"""Seeds are arithmetic that is written down: pinned values, one for every step, process and micro-batch; Python's ``hash`` nowhere."""

from __future__ import annotations

import ast
import hashlib
from itertools import product
from pathlib import Path

import torch

from student_train.draws import draw_seed

ROOT = Path(__file__).parents[2]


def test_values_are_pinned() -> None:
    """Another value is other draws: ``VERSION`` has to count on."""
    assert draw_seed(0, 0, 0) == 1574948166546198548
    assert draw_seed(7, 12, 3, 1) == 1128477763430330508
    data = (5).to_bytes(8, "big") + (1000).to_bytes(8, "big") + b"\xff" * 8
    assert draw_seed(5, 1000, -1) == int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") // 2


def test_every_place_has_its_own() -> None:
    places = [*product(range(3), range(40), range(4)), *product(range(3), range(40), range(4), range(3))]
    seeds = {draw_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_nothing_asks_python_for_a_hash() -> None:
    """``hash`` is Python's own business: it may change with the version, and strings have another one in every process."""
    found = []
    for house in ("pipelines", "student_train", "teacher_cache", "benchmarks", "tests"):
        for path in (ROOT / house).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
