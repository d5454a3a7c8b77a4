"""No pickle is ever loaded: the code has no way to, and one planted wherever a file is read does not run."""

from __future__ import annotations

import ast
import hashlib
import io
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fuzz_targets import Folder, joined, shard_of, small_cache
from pipelines.inspect.cache import check
from student_train.checkpoint import Checkpoints
from student_train.distributed import Processes
from student_train.load_student import load_student
from student_train.whole import FILES, sums, write_sealed
from teacher_cache.errors import CacheError, KdcliError
from teacher_cache.fields import decode_record
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.shards.sealed import seal, unseal
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, load_processor, weights_hash

ROOT = Path(__file__).parents[2]
HOUSES = ("cli.py", "pipelines", "student_train", "teacher_cache")
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OWN_PROCESSES = (("student_train/packed.py", "pickle"), ("pipelines/capture/executors/local.py", "pickle"))
"""Between a run and the processes that it started, never from a file."""


class Planted:
    """A pickle of it touches a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a planted pickle would make; that it would is tried first."""
    path = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Planted(path)))
    assert path.exists()
    path.unlink()
    return path


@cache
def sources() -> list[tuple[str, ast.AST]]:
    places = [ROOT / house for house in HOUSES]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text(), str(file))) for file in files]


def suspects(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(what, where) of everything that could unpickle or run text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names if alias.name.split(".")[0] in LOADERS)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LOADERS:
            yield str(node.module), node
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "torch.load", "torch.jit.load", "np.load", "numpy.load") or any(
                keyword.arg == "allow_pickle" for keyword in node.keywords
            ):
                yield name, node


def test_the_code_has_no_way_to_unpickle() -> None:
    assert len(sources()) > 100
    for path, tree in sources():
        for what, node in suspects(tree):
            assert (path, what) in OWN_PROCESSES, f"{path}:{node.lineno}: {what}"  # type: ignore[attr-defined]


def test_weights_are_asked_for_as_safetensors_everywhere() -> None:
    """A class whose weights are read says so; those of tokenizers, processors and configurations have none."""
    without = ("AutoConfig", "AutoProcessor", "GenerationConfig", "PreTrainedTokenizerFast")
    calls = 0
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".from_pretrained"):
                continue
            if ast.unparse(node.func).split(".")[0] not in without:
                calls += 1
                assert "use_safetensors" in ast.unparse(node) or "**arguments" in ast.unparse(node), path
    assert calls >= 4


def test_a_pickle_in_a_shard_is_no_member(mark: Path) -> None:
    """Beside the members that the index lists it is damage to ``verify``, and the reader passes it by; in place of one it is no record."""
    folder = Folder()
    _, tar, index = shard_of("samples")
    data = pickle.dumps(Planted(mark))
    stream = io.BytesIO(tar)
    with tarfile.open(fileobj=stream, mode="a") as opened:
        for name in ("000000000-00000000.pyd", "000000000-00000000.pkl", "000000000-00000000.pth"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    folder.write_shard("samples", joined(stream.getvalue(), index))
    assert "does not hold the members that its index lists" in "\n".join(
        map(str, check(TeacherCache(str(folder.path))))
    )
    folder.read_all()
    for name in ("vision_topk", "vision_hidden", "affinity"):
        one = TeacherCache(str(folder.path)).open_field(name)
        with pytest.raises(CacheError, match="here"):
            decode_record(one, data, "here")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["vision_hidden", "affinity"])
def test_a_pickle_in_place_of_a_calibration(mark: Path, name: str) -> None:
    """Even where ``field.json`` vouches for it."""
    folder = Folder()
    data, path = pickle.dumps(Planted(mark)), f"fields/{name}/field.json"
    body = unseal(small_cache()[path], "")
    folder.write(body["calibration"]["path"], data)
    body["calibration"]["sha256"] = hashlib.sha256(data).hexdigest()
    folder.write(path, seal(body))
    with pytest.raises(CacheError, match=r"calibration/.* is not readable"):
        TeacherCache(str(folder.path)).open_field(name)
    assert not mark.exists()


def test_a_pickle_in_place_of_a_checkpoint(tmp_path: Path, mark: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = Checkpoints(tmp_path, model, optimizer, {}, 1, Processes(0, 1, torch.device("cpu")))
    saved.save(1)
    saved.wait()
    (written,) = (tmp_path / "step-0000001").glob("*.safetensors")
    whole = written.read_bytes()
    for data in (pickle.dumps(Planted(mark)), whole[: len(whole) // 2], b""):
        written.write_bytes(data)
        for vouched in (False, True):
            if vouched:
                state = {"step": 1, "identity": {}, FILES: sums(written.parent, [written.name])}
                write_sealed(written.parent / "state.json", state)
            said = "damaged checkpoint" if vouched else "damaged .* no other checkpoint is whole"
            with pytest.raises(KdcliError, match=f"step-0000001: {said}") as caught:
                saved.load()
            assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_model_folder_of_pickled_weights(tiny_teacher: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(mark)))
    spec = TeacherSpec(str(folder), device="cpu")
    with pytest.raises(KdcliError, match="safetensors"):
        weights_hash(spec, None)
    with pytest.raises(KdcliError, match="safetensors"):
        TransformersTeacher(spec, *load_processor(spec))
    with pytest.raises(KdcliError, match="safetensors"):
        load_student(str(folder), "sdpa")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(KdcliError, match="cannot be loaded"):
        load_student(str(folder), "sdpa")
    assert not mark.exists()
