"""Records of every version of the sketch, as they were written when it was new: read, and written again byte by byte."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from teacher_cache.codecs import container, transform
from teacher_cache.fields import create_field

FOLDER = Path(__file__).parent
FILES = {int(file.stem.split("-")[1]): file for file in FOLDER.glob("sketch-*.safetensors")}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sketches", FOLDER / "make_sketches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_readable_version_has_its_golden_file() -> None:
    assert set(FILES) == set(transform.READABLE)


@pytest.mark.parametrize("version", FILES)
def test_the_reader_reads_it(version: int) -> None:
    golden = container.unpack(FILES[version].read_bytes())
    calibration = {k.removeprefix("calibration."): v for k, v in golden.items() if k.startswith("calibration.")}
    field = create_field("vision_hidden", {"codec": "sketch", "codec_version": version, "step": 0.5}, calibration)
    kinds = set()
    for name in (one.removeprefix("record.") for one in golden if one.startswith("record.")):
        stored = container.unpack(golden[f"record.{name}"].numpy().tobytes())
        kinds.add(frozenset(stored))
        read = field.decode(stored)
        torch.testing.assert_close(read.coefficients, golden[f"coefficients.{name}"], rtol=0, atol=1e-5)
        assert torch.equal(read.mean_logit, golden[f"mean_logit.{name}"])
    plain, own = frozenset({"coded"}), frozenset({"coded", "symbols"})
    assert kinds == ({plain} if version == 1 else {plain, own})


@pytest.mark.parametrize("version", FILES)
def test_the_writer_writes_the_same_bytes(version: int, maker: ModuleType) -> None:
    """A field that was begun with a version goes on with it, and what is lost of it is made again as it was."""
    golden, made = container.unpack(FILES[version].read_bytes()), maker.make(version)
    assert made.keys() == golden.keys()
    for name in (one for one in golden if one.startswith("record.")):
        assert torch.equal(made[name], golden[name]), name
