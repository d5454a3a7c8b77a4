"""vLLM serves an exported student with the tokens that transformers says: its own LLaVA, or the transformers backend for a package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.export.run import ExportRequest, export
from student_train.compressors import CompressorSpec, compressor_modules
from student_train.load_student import load_student, save_student
from tests.conftest import build_folder

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs this in an environment that has it")

SERVE = Path(__file__).with_name("serve.py")


def serve(folder: Path, implementation: str) -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, str(SERVE), str(folder), implementation],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def agree(said: dict[str, list[int]]) -> None:
    assert said["prompt"][0] == said["prompt"][1], "vLLM expands the placeholder as the processor does"
    assert said["vllm"] == said["transformers"] and len(said["vllm"]) >= 1


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_student``, with heads of 32: vLLM refuses its 16 on a CPU."""
    return build_folder(tmp_path_factory.mktemp("models") / "student", text_width=64, vision_width=24, seed=2)


def test_a_stock_student(student: Path, tmp_path: Path) -> None:
    """By vLLM's own LLaVA, which wants the published names of the vision tower."""
    export(ExportRequest(student, tmp_path / "stock"))
    agree(serve(tmp_path / "stock", "auto"))


@pytest.mark.parametrize("name", sorted(compressor_modules()))
def test_a_package(student: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(4)
    model, processor = load_student(str(student), "sdpa", compressor=CompressorSpec(name, 4))
    save_student(model, processor, tmp_path / "student")
    export(ExportRequest(tmp_path / "student", tmp_path / "package"))
    agree(serve(tmp_path / "package", "transformers"))
