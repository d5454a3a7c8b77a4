"""Teacher-forced forward of any Hugging Face image-text-to-text or causal language model; vision and response rows leave, everything
else stays.

One uniform way for every family: post-final-norm hidden states h = ``model.model(…).last_hidden_state``, head W =
``get_output_embeddings().weight``; logits are h·Wᵀ by a scale and a soft cap (``head_form``). That is compared with the model's own
logits on the first batch, and a head that breaks it is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.models.head import head_logits
from teacher_cache.models.head_form import check_rows, head_form
from teacher_cache.models.kind import auto_model, decoder_of, open_config, open_processor, reads_images
from teacher_cache.models.loading import attending, naming_what_fails
from teacher_cache.models.text_vision import layer_inputs, text_vision_attention
from teacher_cache.models.weights import check_weights, refuse_missing
from teacher_cache.preparing.batch import Batch, collate
from teacher_cache.preparing.fingerprint import processor_fingerprint
from teacher_cache.preparing.layout import COMPRESSED
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers.signals import Signals
from teacher_cache.wants import Wants

BACKENDS = ("transformers", "vllm")
VLLM_ROUTES = ("hidden", "logprobs")


@dataclass(frozen=True)
class TeacherSpec:
    """Which model, and how it runs.

    Attributes:
        id: model folder or hub id; ``null:FOLDER`` generates fake signals.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto``: the checkpoint's own on a GPU, float32 on a CPU.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: a GPU if there is one.
        attn_implementation: ``sdpa``, ``eager`` or ``flash_attention_2``.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the program code that the model's folder or repository brings; read it first.
        backend: ``transformers`` or ``vllm``.
        vllm_route: output taken from vLLM: ``hidden`` states, which serve every field, or its own ``logprobs``, with an inexact tail.
        vllm_memory: share of the GPU's memory for vLLM, including its key-value cache; the rest is for the head.
    """

    id: str
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    backend: str = "transformers"
    vllm_route: str = "hidden"
    vllm_memory: float = 0.8

    def __post_init__(self) -> None:
        for name, choices in (("backend", BACKENDS), ("vllm_route", VLLM_ROUTES)):
            if getattr(self, name) not in choices:
                raise KdcliError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 < self.vllm_memory < 1:
            raise KdcliError(f"vllm_memory must lie between 0 and 1, got {self.vllm_memory}")


def load_processor(spec: TeacherSpec) -> tuple[Any, Any]:
    """(processor, config) without any weights; errors as of ``open_processor``."""
    return open_processor(f"model {spec.id!r}", spec.id, spec.revision, spec.trust_remote_code)


def teacher_reads_images(spec: TeacherSpec) -> bool:
    """Whether it is a model of images and text, by its configuration alone; KdcliError where there is none to be had."""
    return reads_images(open_config(f"model {spec.id!r}", spec.id, spec.revision, spec.trust_remote_code))


def resolve_dtype(spec: TeacherSpec, config: Any) -> torch.dtype:
    """``auto`` is the checkpoint's own type on CUDA and float32 elsewhere (half precision is slow or inexact on CPUs)."""
    if spec.dtype != "auto":
        dtype = getattr(torch, spec.dtype, None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise KdcliError(f"dtype {spec.dtype!r}: choose auto, float32, bfloat16 or float16")
        return dtype
    if resolve_device(spec).type != "cuda":
        return torch.float32
    return getattr(config, "dtype", None) or torch.bfloat16


def resolve_device(spec: TeacherSpec) -> torch.device:
    if spec.device != "auto":
        try:
            device = torch.device(spec.device)
        except RuntimeError:
            raise KdcliError(f"device {spec.device!r}: choose auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise KdcliError(f"device {spec.device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def teacher_fingerprint(spec: TeacherSpec, processor: Any, config: Any) -> dict[str, Any]:
    """What decides the teacher's numbers; computed without loading the weights (their files are hashed)."""
    refuse_compressed(spec, config)
    text_config = config.get_text_config()
    return {
        "weights": weights_hash(spec, config),
        "architecture": (config.architectures or [type(config).__name__])[0],
        "head_width": int(text_config.vocab_size),
        "hidden_size": int(text_config.hidden_size),
        **processor_fingerprint(processor),
        "dtype": str(resolve_dtype(spec, config)).removeprefix("torch."),
        "attn_implementation": spec.attn_implementation,
        "backend": "transformers",
        **({"remote_code": code_hash(spec)} if runs_own_code(spec, processor, config) else {}),
    }


def runs_own_code(spec: TeacherSpec, processor: Any, config: Any) -> bool:
    """Whether code of the model's folder takes part: it was allowed, and configuration or processor point to some."""
    reader = processor.tokenizer if processor.image_processor is None else processor
    own = [one for one in (reader, config) if type(one).__module__.startswith("transformers_modules.")]
    return spec.trust_remote_code and bool(own or getattr(config, "auto_map", None))


def code_hash(spec: TeacherSpec) -> str:
    """sha256 over names and contents of a folder's Python files; the revision for a model that lies on a hub."""
    files = sorted(Path(spec.id).rglob("*.py"))
    digests = [(str(file.relative_to(spec.id)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256(repr(digests).encode()).hexdigest() if files else f"revision:{spec.revision or 'unknown'}"


def refuse_compressed(spec: TeacherSpec, config: Any) -> None:
    """CompatibilityError: stock classes would read a compressed student's weights and leave its compression out."""
    if getattr(config, COMPRESSED, None):
        raise CompatibilityError(
            f"model {spec.id!r} is a student with compressed vision tokens: it can be trained and evaluated, but not be a teacher"
        )


def weights_hash(spec: TeacherSpec, config: Any) -> str:
    """sha256 over the names and contents of the safetensors files; the commit for a model that lies on a hub."""
    folder = Path(spec.id)
    if not folder.is_dir():
        return f"revision:{getattr(config, '_commit_hash', None) or spec.revision or 'unknown'}"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise KdcliError(f"model {spec.id!r}: no *.safetensors in the folder; save it with save_pretrained")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


class TransformersTeacher:
    """A loaded teacher.

    Attributes:
        head: W ``[V, D]`` with the model's scale of logits in it. vocabulary: its width without padding rows (ids ≥ tokenizer length are
            dropped). cap: where logits are cap · tanh(h·Wᵀ / cap).
    """

    def __init__(self, spec: TeacherSpec, processor: Any, config: Any):
        refuse_compressed(spec, config)
        self.device = resolve_device(spec)
        what = f"model {spec.id!r}"
        check_weights(what, spec.id, config, spec.trust_remote_code)
        with naming_what_fails(f"the weights of {spec.id!r}"):
            loaded: Any = auto_model(config).from_pretrained(
                spec.id,
                dtype=resolve_dtype(spec, config),
                **attending(config, spec.attn_implementation),
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=True,  # other checkpoints are pickles
                output_loading_info=True,
            )
            refuse_missing(what, loaded[1])
        self.model: Any = loaded[0]
        self._adopt(processor)

    @classmethod
    def wrap(cls, model: Any, processor: Any) -> TransformersTeacher:
        """A teacher around a model that is already loaded (tests, live-teacher comparisons)."""
        teacher = cls.__new__(cls)
        teacher.device = next(model.parameters()).device
        teacher.model = model
        teacher._adopt(processor)
        return teacher

    def _adopt(self, processor: Any) -> None:
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self.pad_id = processor.tokenizer.pad_token_id or 0
        form = head_form(self.model)
        weight = self.model.get_output_embeddings().weight.detach()[: len(processor.tokenizer)]
        self.head, self.cap = form.weight(weight).to(self.device), form.cap
        self.vocabulary = self.head.shape[0]
        self._signals = Signals(self.head, self.cap)
        self._head_checked = False

    @property
    def state_bytes(self) -> int:
        """Of one hidden state as it is told."""
        return self.head.shape[1] * self.head.element_size()

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """Post-final-norm hidden states, flattened ``[B·T, D]``."""
        states = decoder_of(self.model)(**batch.inputs, use_cache=False).last_hidden_state
        if not self._head_checked:
            self._check_head(batch, states)
        return states.flatten(0, 1)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        """What the fields want of each row, on the CPU; NaN and infinity come back as they are."""
        batch = collate(prepared, self.pad_id).to(self.device)
        states, attention, features = self._hidden_and_first(batch, wants)
        rows = {name: states[batch.rows[name]] for name in wants.row_kinds}
        return [
            replace(
                said,
                attention={layer: each[i] for layer, each in attention.items()},
                features=features[i] if features is not None else None,
            )
            for i, said in enumerate(self._signals(rows, batch.counts, prepared, wants))
        ]

    def _hidden_and_first(
        self, batch: Batch, wants: Wants
    ) -> tuple[torch.Tensor, dict[int, list[torch.Tensor]], Sequence[torch.Tensor] | None]:
        """Hidden states; by layer what text tokens pay vision tokens, the mean over heads where no field wants each; vision features.

        The latter two are on the CPU, one a sample.
        """
        with layer_inputs(self.model, wants.layers) as seen:
            states = self.hidden(batch)
        attention = {
            layer: [one.cpu() for one in text_vision_attention(self.model, layer, seen, batch, heads == "mean")]
            for layer, heads in wants.attention.items()
        }
        features = None
        if wants.features:
            features = seen.hidden[0].flatten(0, 1)[batch.rows["vision"]].cpu().split(list(batch.counts["vision"]))
        return states, attention, features

    def _check_head(self, batch: Batch, states: torch.Tensor) -> None:
        """Once: rows that are not finite are reported one by one, and the next batch is checked instead."""
        self._head_checked = check_rows(
            self.model, batch.inputs, states, lambda rows: head_logits(rows, self.head, self.cap), self.vocabulary
        )
