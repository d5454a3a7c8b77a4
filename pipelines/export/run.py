"""``kdcli export``: a trained student as a folder that plain transformers loads, with its processor, chat template and model card."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.export.card import model_card
from pipelines.export.check import check, expected_logits, write_rows
from pipelines.export.package import make_package
from pipelines.export.provenance import find_model, read_object, read_provenance, trained_template
from pipelines.export.served import serving_notes
from pipelines.export.weights import round_weights, save_own, save_stock
from student_train.compression import compressor_of
from student_train.compressors import CompressorSpec
from student_train.load_student import load_student, share
from student_train.whole import sync_files
from teacher_cache.errors import KdcliError, naming_full_disk
from teacher_cache.families import family_of
from teacher_cache.models.kind import reads_images
from teacher_cache.shards.local_disk import sync_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportRequest:
    """What is asked.

    Attributes:
        source: model folder, stage folder or run. out: a folder that is not there yet, or empty.
        dtype: of the weights; None: as the student's folder has them.
        vision_tokens: of an image, for a compressor that serves several counts; None: as trained.
        check: load the folder in a fresh process and compare, before it gets its name.
        scores: file of ``kdcli eval --out`` for the model card; None: the run's ``scores.json``.
    """

    source: Path
    out: Path
    dtype: str | None = None
    vision_tokens: int | None = None
    check: bool = False
    scores: Path | None = None


def export(request: ExportRequest) -> dict[str, Any]:
    """Write the folder, whole or not at all.

    Returns:
        ``{"folder", "model", "dtype", "compressor", "remote_code", "bytes", "notes"}`` and, where it was asked for, ``"check"``.

    Raises:
        KdcliError: nothing to export, a folder that is taken, or a check that fails; then nothing is left behind.
    """
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise KdcliError(f"{request.out} already exists: choose another --out, or remove it")
    source = find_model(request.source)
    refuse_own_code(source)
    origin, template = read_provenance(source, request.scores), known_template(source)
    asked = None if request.vision_tokens is None else CompressorSpec("", request.vision_tokens)
    model, processor = load_student(str(source), "sdpa", compressor=asked)
    model.eval()
    config: Any = model.config
    spec, dtype = compressor_of(model.config), request.dtype or stored_dtype(source)
    with draft_of(request.out) as draft, tempfile.TemporaryDirectory() as rows:
        exact = prepare_check(model, processor, Path(rows)) if request.check else None
        round_weights(model, DTYPES[dtype])
        write_folder(model, processor, spec, draft)
        share(draft.glob("*.safetensors"))
        name = request.out.resolve().name
        (draft / "README.md").write_text(
            model_card(origin, spec, dtype, name, config.model_type, template, reads_images(config))
        )
        result = {
            "folder": str(request.out),
            "model": str(source),
            "dtype": dtype,
            "compressor": spec and spec.entry(),
            "remote_code": spec is not None,
            "bytes": sum(file.stat().st_size for file in draft.iterdir()),
            "notes": [*template_notes(template), *image_notes(config, processor), *serving_notes(config)],
        }
        if exact is not None:
            result["check"] = run_check(model, processor, draft, Path(rows), exact)
    return result


def known_template(source: Path) -> str | None:
    with suppress(KdcliError):  # trained with several: no single prompt is its own
        return trained_template(str(source))
    return None


def template_notes(template: str | None) -> list[str]:
    if template in (None, "chat"):
        return []
    return [
        f"it was trained with template {template}, which is not the chat template of its folder: README.md there shows such a prompt, and "
        f"`kdcli eval` wants --template {template}"
    ]


def image_notes(config: Any, processor: Any) -> list[str]:
    arguments = family_of(config).image_arguments(processor)
    told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return (
        [f"it was trained with images read by processor(…, {told}), which plain transformers must be told"]
        if told
        else []
    )


def refuse_own_code(source: Path) -> None:
    if "auto_map" in read_object(source / "config.json"):
        raise KdcliError(
            f"{source} has program code of its own (auto_map), so it needs no export: copy the folder as it is, including the code"
        )


def stored_dtype(source: Path) -> str:
    """What the folder's configuration says of its weights; float32 where it says nothing, or something that is not offered."""
    body = read_object(source / "config.json")
    said = body.get("dtype") or body.get("torch_dtype")
    return said if said in DTYPES else "float32"


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well, and else is gone."""
    parent = out.resolve().parent
    with naming_full_disk(out):
        parent.mkdir(parents=True, exist_ok=True)
        draft = parent / f"{out.name}.draft-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            yield draft
            sync_files(draft)
            put_in_place(draft, out)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def put_in_place(draft: Path, out: Path) -> None:
    """The draft gets its name, where nothing got it meanwhile: two exports to one folder end with the first one's."""
    try:
        os.replace(draft, out.resolve())
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise KdcliError(
            f"{out} was created meanwhile by another process: choose another --out, or remove it"
        ) from None
    sync_folder(out.resolve().parent)


def write_folder(model: Any, processor: Any, spec: CompressorSpec | None, folder: Path) -> None:
    """Weights as they are in memory, configuration, processor; the program code of a compressor."""
    if spec is None:
        save_stock(model, folder)
        processor.save_pretrained(folder)
        return
    model.config.dtype = model.dtype
    save_own(model, folder)
    processor.save_pretrained(folder)
    make_package(folder, spec)


def prepare_check(model: Any, processor: Any, rows: Path) -> dict[str, torch.Tensor]:
    """Logits of the student as it was trained; rows: where the questions go."""
    return expected_logits(model, processor, write_rows(rows, processor), rows)


def run_check(model: Any, processor: Any, draft: Path, rows: Path, exact: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The folder against the student with equally rounded weights; ``rounding``: how far those are from the student's own."""
    round_weights(model, torch.float32)
    expected = expected_logits(model, processor, json.loads((rows / "rows.json").read_text()), rows)
    moved = max((expected[name] - exact[name]).abs().max().item() for name in exact if name.endswith(".logits"))
    # The fresh process needs the memory more.
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    return {**check(draft, rows, expected), "rounding": moved}
