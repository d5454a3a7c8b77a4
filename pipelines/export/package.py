"""A compressed student as a folder with its own program code (``auto_map``), which plain transformers loads when it is trusted.

Its ``model_type`` is its own: a program that does not run the code says so, where the stock class would read the weights and leave the
compression out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.export import modeling, processing
from pipelines.export.flatten import flatten
from student_train.compressors import CompressorSpec, compressor_module
from teacher_cache.preparing.layout import COMPRESSED

TEMPLATE = "student_train.compressors.adaptive_pool"
"""The compressor that ``modeling.py`` imports, in whose place the student's own is put."""
MODELING, PROCESSING = "modeling_compressed_llava", "processing_compressed_llava"
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.{modeling.CompressedLlavaConfig.__name__}",
    "AutoModel": f"{MODELING}.{modeling.CompressedLlavaModel.__name__}",
    "AutoModelForImageTextToText": f"{MODELING}.{modeling.CompressedLlavaForConditionalGeneration.__name__}",
}


def modeling_source(compressor: str) -> str:
    """``modeling_compressed_llava.py`` of a student with this compressor."""
    module = compressor_module(compressor)
    header = f'"""LLaVA with the compressor {module.NAME} ({module.PAPER}) in the projector\'s place. Written by kdcli export."""\n\n'
    return header + flatten(modeling.__name__, {TEMPLATE: module.__name__})


def processing_source() -> str:
    header = '"""LLaVA\'s processor for a model with fewer vision tokens than patches. Written by kdcli export."""\n\n'
    return header + flatten(processing.__name__)


def make_package(folder: Path, spec: CompressorSpec) -> None:
    """Turn a saved student (configuration, processor) into a package; its weights are not touched."""
    (folder / f"{MODELING}.py").write_text(modeling_source(spec.name))
    (folder / f"{PROCESSING}.py").write_text(processing_source())
    edit_json(
        folder / "config.json",
        remove=(COMPRESSED,),
        model_type=modeling.CompressedLlavaConfig.model_type,
        architectures=[modeling.CompressedLlavaForConditionalGeneration.__name__],
        auto_map=AUTO_MAP,
        compressor=spec.entry(),
        image_seq_length=spec.count,
    )
    name = processing.CompressedLlavaProcessor.__name__
    own: dict[str, Any] = {
        "processor_class": name,
        "auto_map": {"AutoProcessor": f"{PROCESSING}.{name}"},
        "vision_tokens": spec.count,
    }
    edit_json(folder / "processor_config.json", **own)
    edit_json(folder / "tokenizer_config.json", processor_class=name)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: body[name] for name in sorted(body.keys() - set(remove))}, indent=2) + "\n")
