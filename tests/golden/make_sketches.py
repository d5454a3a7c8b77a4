"""Writes ``tests/golden/sketch-V.safetensors``: a calibration, rows, and their records under version V of the sketch.

``python tests/golden/make_sketches.py V FILE``. Everything is small multiples of powers of two, so every machine makes the same. Run it
again only for a new version: the old files stay, and their records must stay readable and writable.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from teacher_cache.codecs import container
from teacher_cache.fields import create_field
from teacher_cache.records import ImageLayout, TeacherOutput, View

D, RANK = 6, 4
ROWS = {"empty": 0, "grid": 16, "many": 1100}


def calibration() -> dict[str, torch.Tensor]:
    """Four dimensions of six, three classes, tables that escape what is beyond ±2."""
    table = torch.tensor([0.0625, 0.125, 0.5, 0.125, 0.0625, 0.125])
    classes = torch.tensor([[0, 0, 1, 2], *[[1, 0, 2, 2]] * 8], dtype=torch.uint8)
    return {
        "mean": torch.tensor([0.5, -0.25, 0.0, 1.0, 0.0, 2.0]),
        "encode": torch.eye(D)[:, :RANK].contiguous(),
        "step": torch.tensor([0.5]),
        "classes": classes,
        "tables": table.repeat(3),
        "sizes": torch.tensor([6, 6, 6], dtype=torch.int32),
        "shrink": torch.tensor([0.0, 0.125, 0.25]),
        "table.mean_logit": table,
        "low.mean_logit": torch.tensor([-2]),
        "mean_weight": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.03125]),
    }


def rows(name: str) -> torch.Tensor:
    """``[R, D]``: whole numbers that differ from dimension to dimension; "many" beyond what the tables know."""
    place = torch.arange(ROWS[name] * D).reshape(-1, D)
    wide = 41 if name == "many" else 3
    return (((place * 2654435761) % 2**32 // 65536) % wide - wide // 2).to(torch.float32)


def output(name: str) -> TeacherOutput:
    layout = (ImageLayout((4, 4), (View((0, 0, 4, 4), (4, 4)),)),) if name == "grid" else ()
    return TeacherOutput({"vision": rows(name)}, layout=layout)


def field(version: int) -> Any:
    return create_field("vision_hidden", {"codec": "sketch", "codec_version": version, "step": 0.5}, calibration())


def make(version: int) -> dict[str, torch.Tensor]:
    """Name → the bytes of a tar member; and what a reader makes of it."""
    made = {f"calibration.{name}": one for name, one in calibration().items()}
    one = field(version)
    for name in ROWS:
        stored = one.encode(None, output(name))
        made[f"record.{name}"] = torch.frombuffer(bytearray(container.pack(stored)), dtype=torch.uint8)
        read = one.decode(stored)
        made |= {f"coefficients.{name}": read.coefficients.contiguous(), f"mean_logit.{name}": read.mean_logit}
    return made


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(container.pack(make(int(sys.argv[1]))))
