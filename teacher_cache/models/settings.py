"""Settings of a model folder that may load code, or are no model's: refused before anything reads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from teacher_cache.errors import KdcliError

CONFIG = "config.json"
PROCESSING = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
ATTENTION = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{n}" for n in (2, 3, 4)))
EXPERTS = ("eager", "batched_mm", "grouped_mm")
DTYPES = ("float32", "float64", "bfloat16", "float16", "float", "half", "double")
QUANTIZED = (
    *("aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    *("compressed-tensors", "gptq", "hqq", "quanto", "spqr", "torchao", "vptq"),
)
"""Methods whose code is a package that is installed here; others fetch kernels from a hub."""
CLASS_KEYS = (
    *("processor_class", "image_processor_type", "image_processor_class", "feature_extractor_type"),
    *("feature_extractor_class", "video_processor_type", "video_processor_class", "tokenizer_class"),
)

CLASS = re.compile(
    r"(?!Auto)\w+(Processor|Tokenizer|Extractor)(Fast|Pil)?|\w+Backend|PreTrainedTokenizerFast", re.ASCII
)
"""Of processors and tokenizers. transformers takes any name of its own there, models too."""
PLAIN_NAME = re.compile(r"[\w][\w.-]*", re.ASCII)
REACH = "may load code or weights from elsewhere: read that code, then give --trust-remote-code, or remove that key"
POSITIVE = {
    *("hidden_size", "d_model", "embed_dim", "intermediate_size", "num_hidden_layers", "num_layers", "depth"),
    *("num_attention_heads", "num_heads", "num_key_value_heads", "head_dim", "vocab_size", "patch_size"),
    *("image_size", "num_channels", "in_channels", "spatial_merge_size", "temporal_patch_size"),
}
"""Sizes without which nothing can be computed."""
MOST = (
    (re.compile(r"layers?$|^depths?$|blocks$"), 4096),
    (re.compile(r"heads?$|experts?$|stages$|groups?$"), 16384),
    (re.compile(r"vocab"), 1 << 24),
    (re.compile(r"^max_patches$|tiles$|crops$"), 1 << 10),
    (re.compile(r"^(height|width|size|crop_size)$"), 1 << 14),
    (re.compile(r"edge$|pixels$"), 1 << 26),
    (re.compile(r"image_size|patch_size|stride|kernel|queries|latents|image_seq_len|image_tokens|merge_size"), 1 << 16),
    (re.compile(r"position|_length$|_len$"), 1 << 28),
    (re.compile(r"(_size|_dim|_dims|_width|_channels|_rank|d_model|d_ff|d_kv|n_embd|n_inner)$"), 1 << 21),
)
"""The most that a size may say, by its name; the first that fits counts. Published models stay an order of magnitude below."""
MANY = 1 << 20
"""Layers × experts: each is a module that has to be built."""
PARTS = ("text_config", "vision_config", "quantization_config", "backbone_config", "audio_config")
TOKEN = re.compile(r"_token_(id|index)$")
SIZED = (CONFIG, *PROCESSING)


def _check_body(what: str, file: str, body: Mapping[str, Any], trusted: bool) -> None:
    for path, key, value, around in _entries(body):
        said = f"{what}: {file} says {path} = {_short(value)}"
        if key in ("transformers_weights", "configuration_files", "fast_tokenizer_files") and value:
            raise KdcliError(f"{said}, which replaces the files that are checked: remove that key")
        if not trusted and (reason := _reaches(file, path, key, value, around)) is not None:
            raise KdcliError(f"{said}{reason}, which {REACH}")
        if (
            file == CONFIG
            and key in ("dtype", "torch_dtype")
            and "quantization" not in path
            and not _is_dtype(key, value)
        ):
            raise KdcliError(f"{said}: no type of weights that is known here: give float32, bfloat16 or float16")
        of_parts = "implementation" in path or "dtype" in path  # a value a part
        if file == CONFIG and key in PARTS and not of_parts and not isinstance(value, (dict, type(None))):
            raise KdcliError(f"{said}: a JSON object is expected there")
        if file == CONFIG and TOKEN.search(key) and not all(_is_id(one) for one in _leaves(value)):
            raise KdcliError(f"{said}: a token's number is expected")
        if file in SIZED and (fault := _size_fault(key, value)):
            raise KdcliError(f"{said}: {fault}: use {file} as the model's author published it")
    if file == CONFIG:
        _check_whole(what, body)


def _entries(body: Any, before: str = "") -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
    """(path, key, value, the object that it stands in) of everything that has a key."""
    if isinstance(body, Mapping):
        for key, value in body.items():
            yield f"{before}{key}", str(key), value, body
            yield from _entries(value, f"{before}{key}.")
    elif isinstance(body, list):
        for one in body:
            if isinstance(one, (Mapping, list)):
                yield from _entries(one, before)


def _reaches(file: str, path: str, key: str, value: Any, around: Mapping[str, Any]) -> str | None:
    """What is wrong with an entry that leads elsewhere, "" where its name says enough; None for all others."""
    bare = key.lstrip("_")
    if bare in ("attn_implementation", "attn_implementation_internal"):
        return None if all(one in (None, *ATTENTION) for one in _leaves(value)) else f" (known: {', '.join(ATTENTION)})"
    if bare in ("experts_implementation", "experts_implementation_internal"):
        return None if all(one in (None, *EXPERTS) for one in _leaves(value)) else f" (known: {', '.join(EXPERTS)})"
    if key == "auto_map" and file == CONFIG:
        return None if path == key or not value else ""  # of the whole: transformers asks for trust itself
    if key in ("use_kernels", "use_pretrained_backbone", "use_timm_backbone", "custom_generate", "compile_config"):
        return "" if value else None
    if "kernel" in key and isinstance(value, (str, dict)) and file == CONFIG:
        return ""
    timm = str(around.get("model_type", "")).startswith("timm_")
    if isinstance(value, str) and (key == "backbone" or (key == "architecture" and timm)):
        return None if timm and PLAIN_NAME.fullmatch(value) else ""
    if key.startswith("audio_tokenizer") and value:
        return ""
    if key == "trust_remote_code" and value:
        return ""
    if key == "quantization_config" and value:
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        flagged = isinstance(value, Mapping) and (value.get("load_in_4bit") or value.get("load_in_8bit"))
        return None if method in QUANTIZED or flagged is True else f" (known methods: {', '.join(QUANTIZED)})"
    if key in CLASS_KEYS and value is not None:
        return None if isinstance(value, str) and CLASS.fullmatch(value) else " (no processor's or tokenizer's class)"
    if bare.endswith("_file") and isinstance(value, str) and file == "tokenizer_config.json":
        # Published ones hold paths of their makers' machines, which are not here.
        return "" if "/" in value.removeprefix("./") and Path(value).exists() else None
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, list)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(one)
    else:
        yield value


def _is_id(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31)


def _is_dtype(key: str, value: Any) -> bool:
    if value == "auto":
        return key == "torch_dtype"  # the older name, under which transformers takes it
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in DTYPES)


def _size_fault(key: str, value: Any) -> str:
    """Why no model can have this size; "" where it can, or where ``key`` names none."""
    most = next((most for pattern, most in MOST if pattern.search(key)), None)
    if most is None or value is None:
        return ""
    listed = value if isinstance(value, list) else [value]
    for one in listed:
        if key in POSITIVE and (isinstance(one, bool) or not isinstance(one, (int, dict))):
            return "a whole number is expected"
        if isinstance(one, float) and not math.isfinite(one):
            return "a finite number is expected"
        if isinstance(one, (int, float)) and abs(one) > most:
            return f"at most {most:,} are taken"
        if isinstance(one, int) and one < 1 and key in POSITIVE:
            return "a number above 0 is expected"
    return ""


def _check_whole(what: str, body: Mapping[str, Any]) -> None:
    """What several entries say together, and those that are no sizes."""
    for key, wanted in (("model_type", str), ("architectures", list)):
        if not isinstance(body.get(key), (wanted, type(None))):
            raise KdcliError(f"{what}: {CONFIG} says {key} = {_short(body[key])}: {wanted.__name__} is expected")
    if not all(isinstance(one, str) for one in body.get("architectures") or []):
        raise KdcliError(f"{what}: {CONFIG} says architectures = {_short(body['architectures'])}: names are expected")
    for part in (body, *(one for one in body.values() if isinstance(one, Mapping))):
        heads, shared = (part.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise KdcliError(
                f"{what}: {CONFIG} says {heads} attention heads in {shared} groups, which do not divide them"
            )
        layers, experts = (
            part.get("num_hidden_layers"),
            [part.get(n) for n in ("num_experts", "num_local_experts", "n_routed_experts")],
        )
        most = max((one for one in experts if isinstance(one, int)), default=1)
        if isinstance(layers, int) and layers * most > MANY:
            raise KdcliError(f"{what}: {CONFIG} says {layers} layers of {most} experts: at most {MANY:,} are supported")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
