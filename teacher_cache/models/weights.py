"""A model's weights against what its configuration describes, before they are read into memory: names, headers, sizes.

Only headers of safetensors files are read here. Of a model on a hub, whose files are not here yet, nothing is compared beforehand.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from teacher_cache.errors import KdcliError
from teacher_cache.models.files import read_json
from teacher_cache.models.kind import auto_model
from teacher_cache.models.loading import naming_what_fails

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SLACK = 2
"""The model may be so many times its weights: tied ones are stored once."""
PACKED = 16
"""Weights of two bits, the narrowest, stand so many in an int32."""
SPARE = 1 << 20


def check_weights(what: str, name: str, config: Any, trusted: bool = False) -> None:
    """KdcliError where a folder's weights are not whole, or its configuration describes a model that they cannot be.

    Args:
        config: of transformers. trusted: the model may be built by its folder's own code, which is not asked here.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    tensors, elements = _stored(what, folder)
    if trusted:
        return
    for part in (config, *(getattr(config, one, None) for one in ("text_config", "vision_config"))):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > tensors:
            raise KdcliError(
                f"{what}: config.json describes {layers} layers, and its weights are {tensors} tensors: take both from one model"
            )
    declared = _declared(what, config)
    packed = PACKED if getattr(config, "quantization_config", None) else 1
    if declared > SLACK * packed * elements + SPARE:
        raise KdcliError(
            f"{what}: config.json describes a model of {declared:,} parameters, and its weights hold {elements:,}: take both from one model"
        )


def refuse_missing(what: str, found: Mapping[str, Any]) -> None:
    """KdcliError where transformers drew weights at random for want of stored ones. found: its loading info."""
    if missing := sorted(found.get("missing_keys") or ()):
        raise KdcliError(
            f"{what}: its weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which config.json describes and which would be random numbers: take both from one model"
        )


def _stored(what: str, folder: Path) -> tuple[int, int]:
    """(tensors, numbers in them) by the headers of the files that transformers will read."""
    names = {SINGLE: None} if (folder / SINGLE).exists() else _indexed(what, folder)
    tensors = elements = 0
    for name, wanted in names.items():
        path = folder / name
        if not path.exists():
            raise KdcliError(f"{path}: no such file, and {INDEX} names it: fetch the model's missing files")
        if not stat.S_ISREG(path.stat().st_mode):
            raise KdcliError(f"{path}: not a plain file: weights are")
        try:
            with safe_open(path, "pt") as opened:
                keys = list(opened.keys())
                for key in keys:
                    count = 1
                    for side in opened.get_slice(key).get_shape():
                        count *= side
                    elements += count
        except (SafetensorError, OSError, ValueError) as error:
            raise KdcliError(
                f"the weights of {what} cannot be loaded ({path.name}: {error}): fetch that file again"
            ) from None
        tensors += len(keys)
        if lacking := sorted((wanted or set()) - set(keys)):
            raise KdcliError(f"{path}: has no {lacking[0]!r}, which {INDEX} says it has: fetch the model's files again")
    return tensors, elements


def _indexed(what: str, folder: Path) -> dict[str, set[str]]:
    """File → tensors that the index says it has; KdcliError where that is none, or leads out of the folder."""
    path = folder / INDEX
    if not path.exists():
        raise KdcliError(f"{what}: no {SINGLE} in that folder: save it with save_pretrained (safetensors)")
    if not stat.S_ISREG(path.stat().st_mode):
        raise KdcliError(f"{path}: not a plain file")
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise KdcliError(f"{path}: weight_map must name a file for each tensor: fetch the file again")
    files: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise KdcliError(
                f"{path}: weight_map names {str(name)[:80]!r} for {tensor[:80]!r}: a *.safetensors file of that folder is expected"
            )
        files.setdefault(name, set()).add(tensor)
    return files


def _declared(what: str, config: Any) -> int:
    """Numbers in the model that the configuration describes, built without memory for them."""
    with naming_what_fails(what), torch.device("meta"):
        model = auto_model(config).from_config(config, attn_implementation="eager")
    return sum(one.numel() for one in (*model.parameters(), *model.buffers()))
