"""What most tests share: a tiny teacher and student of the same vision grid, a tiny rendered world, and caches made of them.

Everything is real (stock Hugging Face folders, the shipped tokenizer, the whole capture), only small: 36 vision tokens an image,
48 wide, two layers. Session-scoped fixtures are read-only; a test that damages a cache works on ``copy_of``.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the hub
os.environ["KDCLI_MEMORY"] = tempfile.mkdtemp(prefix="kdcli-memory-")  # finished captures, by whichever test
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # several of us share the cores: two threads each took half as much time again

import pytest

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)

# isort: split
import torch

IMAGE_SIZE, PATCH = 96, 16
VISION_TOKENS = (IMAGE_SIZE // PATCH) ** 2
PADDING_ROWS = 7  # rows of the head beyond the tokenizer's length, as real checkpoints have them
ALL_FIELDS = ("response_topk", "vision_topk", "response_hidden", "vision_hidden", "affinity", "relation")


ALONE = {Path(__file__).parent / folder: package for folder, package in (("families", "torchvision"), ("trl", "trl"))}
"""Tests of packages that lie beside the environment: the Makefile runs them by themselves."""
LONG = (
    "test_docs.py",
    "test_processes.py",
    "test_stopped.py",
    "test_cache_teacher.py",
    "test_preflight.py",
    "test_ablate.py",
    "test_run.py",
    "test_text_only.py",
    "test_ray.py",
    "test_durable.py",
    "test_estimate.py",
)
"""Files that take long: begun first, they do not keep one process busy when the other has nothing left."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Who asks for such a folder by name is told of the missing package."""
    package = ALONE.get(collection_path)
    asked = any(f"tests/{collection_path.name}" in one for one in config.args)
    return True if package and not asked and not find_spec(package) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def build_folder(
    folder: Path, text_width: int, vision_width: int, seed: int, patch: int = PATCH, layers: int = 2
) -> Path:
    """A stock LLaVA folder with random weights, the demo tokenizer and the demo's chat template; (96 / patch)² vision tokens."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from benchmarks.demo_training.tokenizer import CHAT_TEMPLATE, load_tokenizer

    tokenizer = load_tokenizer()
    text = Qwen2Config(
        vocab_size=len(tokenizer) + PADDING_ROWS,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # narrow layers: distributions that are not flat
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=patch,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // patch) ** 2,
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def ending_as_vicuna(folder: Path, target: Path) -> Path:
    """A copy of such a folder that template ``v1`` can teach, as LLaVA-1.5's: ``</s>`` is a token, and ends an answer beside its own."""
    import json

    from transformers import AutoProcessor

    shutil.copytree(folder, target)
    processor = AutoProcessor.from_pretrained(folder)
    ends = [processor.tokenizer.eos_token_id]
    processor.tokenizer.add_special_tokens({"eos_token": "</s>"})
    processor.save_pretrained(target)
    ends.append(processor.tokenizer.eos_token_id)
    for name in ("config.json", "generation_config.json"):
        body = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**body, "eos_token_id": ends}))
    return target


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of tests that need one; they are skipped where there is none. ``KDCLI_TEST_DEVICE=cpu`` rehearses them."""
    device = os.environ.get("KDCLI_TEST_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher folder: 48 wide, head with ``PADDING_ROWS`` rows beyond the tokenizer."""
    return build_folder(tmp_path_factory.mktemp("models") / "teacher", text_width=48, vision_width=32, seed=1)


@pytest.fixture(scope="session")
def coarse_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student folder with a vision encoder of its own: 9 vision tokens an image where the teacher has 36."""
    folder = tmp_path_factory.mktemp("models") / "coarse"
    return build_folder(folder, text_width=32, vision_width=24, seed=3, patch=32)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student folder: 32 wide, the teacher's tokenizer and vision grid."""
    return build_folder(tmp_path_factory.mktemp("models") / "student", text_width=32, vision_width=24, seed=2)


@pytest.fixture(scope="session")
def deep_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_student`` with three layers: vision tokens can go before the last, as operators do by default."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    return build_folder(folder, text_width=32, vision_width=24, seed=2, layers=3)


@pytest.fixture(scope="session")
def load_copy() -> Callable[[Path], tuple[Any, Any]]:
    """``load_copy(folder)`` → ``load_student(folder, "sdpa")``, read once while the folder's files stay as they are, and copied."""
    from copy import deepcopy

    from student_train import load_student as loading

    read: dict[Any, tuple[Any, Any]] = {}

    def load(folder: Path) -> tuple[Any, Any]:
        files = sorted((one.name, one.stat().st_mtime_ns) for one in folder.iterdir())
        key = (loading.load_student, folder, *files)  # a test may put another in its place
        if key not in read:
            read[key] = loading.load_student(str(folder), "sdpa")
        return deepcopy(read[key])

    return load


@pytest.fixture(scope="session")
def teacher_parts(tiny_teacher: Path) -> tuple[Any, Any]:
    """(processor, config) of the tiny teacher."""
    from teacher_cache.teachers.transformers import TeacherSpec, load_processor

    return load_processor(TeacherSpec(str(tiny_teacher)))


@pytest.fixture(scope="session")
def teacher_model(tiny_teacher: Path) -> Any:
    """The tiny teacher's model in float32, eager attention left at the default, ``eval``."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_teacher, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``WorldPaths``: 10 captions (json), 21 chat rows (two parquet files), 7 held-out questions."""
    from pipelines.demo.write_world import write_world

    return write_world(tmp_path_factory.mktemp("world"), captions=10, train=21, heldout=7, seed=5)


@pytest.fixture(scope="session")
def world_json(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``WorldPaths`` whose chat rows are LLaVA json: defects in 6 of 24, a third of the rows with two pictures."""
    from pipelines.demo.write_world import write_world

    counts = {"captions": 4, "train": 24, "heldout": 7, "defects": 6}
    return write_world(
        tmp_path_factory.mktemp("world_json"), seed=6, train_format="llava-json", two_image_share=0.33, **counts
    )


@pytest.fixture(scope="session")
def mixture(world: Any) -> tuple[Any, ...]:
    """Both parts of ``world``: ``caption`` (plain) and ``sft`` (chat)."""
    from teacher_cache.sources import DataSpec

    return (
        DataSpec("caption", str(world.captions), image_root=str(world.images), template="plain"),
        DataSpec("sft", world.train, template="chat"),
    )


@pytest.fixture(scope="session")
def make_request(tiny_teacher: Path, mixture: tuple[Any, ...]) -> Callable[..., Any]:
    """``make_request(out, codec="fp32", data=None, teacher=None, device="cpu", **capture settings)`` → CaptureRequest; 5 shards, k 8."""
    from pipelines.capture.worker import CaptureRequest
    from pipelines.settings import CaptureSettings
    from teacher_cache.teachers.transformers import TeacherSpec

    def make(
        out: Path | str,
        codec: str = "fp32",
        data: Any = None,
        teacher: Path | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> CaptureRequest:
        defaults = {"shards": 5, "fields": ALL_FIELDS, "workers": 1, "batch_tokens": 1024}
        capture = replace(CaptureSettings(), **{**defaults, **settings})
        step = 2.0**-12 if codec == "fp32" else 2.0**-6
        params = {
            name: {"k": 8, "step": step} if name.endswith("_topk") else {"codec": codec}
            for name in capture.fields
            if name.endswith(("_topk", "_hidden"))
        }
        spec = TeacherSpec(str(teacher or tiny_teacher), dtype="float32", device=device)
        return CaptureRequest(spec, tuple(data or mixture), str(out), capture, params)

    return make


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """A complete cache of ``mixture`` by the tiny teacher: every field, hidden states as fp32, top-8 in steps of 2e-4."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "fp32"
    capture(make_request(out))
    return out


@pytest.fixture(scope="session")
def tiny_cache_bf16(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """The same rows with hidden states as bf16 and top-8 in the steps of a capture."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "bf16"
    capture(make_request(out, codec="bf16"))
    return out


@pytest.fixture(scope="session")
def tiny_cache_standard(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Path:
    """The same rows by the profile ``standard``: head + sketch, factored affinities."""
    from pipelines.capture.cache_teacher import capture

    out = tmp_path_factory.mktemp("caches") / "standard"
    capture(make_request(out, store="standard", fields=()))
    return out


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``tests.warm.Warm``: calls and commands in processes that need import nothing."""
    from tests.warm import Warm

    one = Warm(tmp_path_factory.mktemp("warm"))
    yield one
    one.close()


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """``copy_of(cache)`` → a private copy to damage."""

    def copy(folder: Path) -> Path:
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        return Path(shutil.copytree(folder, target))

    return copy


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """``with small_files(n)``: the system takes no file over n bytes from this process: writing fails in the middle, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
