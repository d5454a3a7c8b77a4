"""Which backend a teacher runs on: the null teacher where its id says so, else as ``TeacherSpec.backend``. Here each is opened."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.teachers import null, transformers, vllm, vllm_answers, vllm_engine
from teacher_cache.teachers.null import NullTeacher
from teacher_cache.teachers.signals import ONLY_LINEAR
from teacher_cache.teachers.transformers import TeacherSpec, TransformersTeacher, resolve_dtype
from teacher_cache.teachers.vllm import VllmTeacher
from teacher_cache.wants import Wants

OpenTeacher = TransformersTeacher | NullTeacher | VllmTeacher


def _backend(spec: TeacherSpec) -> ModuleType:
    if spec.id.startswith(null.PREFIX):
        return null
    return vllm if spec.backend == vllm.BACKEND else transformers


def load_processor(spec: TeacherSpec) -> tuple[Any, Any]:
    """(processor, config) without any weights; KdcliError where they are not to be had."""
    return _backend(spec).load_processor(spec)


def teacher_reads_images(spec: TeacherSpec) -> bool:
    """Whether it is a model of images and text, by its configuration alone; KdcliError where there is none to be had."""
    return _backend(spec).teacher_reads_images(spec)


def teacher_fingerprint(spec: TeacherSpec, processor: Any, config: Any) -> dict[str, Any]:
    """What decides the teacher's numbers; computed without loading the weights."""
    return _backend(spec).teacher_fingerprint(spec, processor, config)


def open_teacher(spec: TeacherSpec, processor: Any, config: Any) -> OpenTeacher:
    """The teacher, ready to be asked: on its device, with its weights."""
    backend = _backend(spec)
    kind = NullTeacher if backend is null else VllmTeacher if backend is vllm else TransformersTeacher
    return kind(spec, processor, config)


def load_head(spec: TeacherSpec, processor: Any, config: Any) -> torch.Tensor:
    """W ``[V, D]`` of the teacher in the dtype that it runs in, loaded on the CPU so that no GPU is held while workers start."""
    if _backend(spec) is vllm:
        return vllm.load_head(spec, processor, config)
    dtype = str(resolve_dtype(spec, config)).removeprefix("torch.")  # "auto" on the CPU would be twice the bytes
    return linear_head(open_teacher(replace(spec, device="cpu", dtype=dtype), processor, config))


def linear_head(teacher: OpenTeacher) -> torch.Tensor:
    """W ``[V, D]`` of a teacher whose logits are h·Wᵀ; CompatibilityError where a soft cap follows."""
    cap = getattr(teacher, "cap", None)
    if cap is not None:
        raise CompatibilityError(ONLY_LINEAR.format(cap=cap))
    return teacher.head


def refuse_wants(spec: TeacherSpec, wants: Wants) -> None:
    """CompatibilityError, before anything is loaded, for what the backend cannot give of any model."""
    if _backend(spec) is vllm:
        vllm_answers.refuse_wants(wants, spec.vllm_route)


def tells_tails(spec: TeacherSpec) -> bool:
    """Whether the teacher's top-k comes with an exact tail and log Z."""
    return _backend(spec) is not vllm or spec.vllm_route == "hidden"


def release() -> None:
    """Before worker processes open teachers of their own: what this process keeps of one is given back."""
    vllm_engine.release()
