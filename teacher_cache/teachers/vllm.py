"""vLLM as the teacher's backend: it runs the model and hands out hidden states, from which our own head makes everything else.

Route ``hidden`` (default): the model as vLLM's pooling runner has it, task ``token_embed``: states of every prompt token *after* the
final norm, not normalised to length 1. Top-k, exact tail, log Z, samples and Gram matrices follow as with transformers.
Route ``logprobs``: vLLM's ``prompt_logprobs`` in flat form, for top-k fields alone; their tail is 1 − Σp and flagged inexact.

Nothing imports vLLM before a teacher is opened: it is an extra (``pip install 'kdcli[vllm]'``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from teacher_cache.errors import CompatibilityError
from teacher_cache.models.head_form import NOT_PLAIN
from teacher_cache.records import Prepared, TeacherOutput
from teacher_cache.teachers import transformers
from teacher_cache.teachers.signals import Signals
from teacher_cache.teachers.transformers import TeacherSpec, resolve_device, resolve_dtype
from teacher_cache.teachers.vllm_answers import (
    MOST_PADDING,
    Said,
    check_expansion,
    outputs_of_log_probs,
    outputs_of_states,
    prompt_of,
    refuse_wants,
)
from teacher_cache.teachers.vllm_engine import engine, naming_refusals, read_head, vllm_version
from teacher_cache.wants import Wants

BACKEND = "vllm"
STATES = {"hidden": "after the final norm, not normalised", "logprobs": "none, log-probs alone"}


def load_processor(spec: TeacherSpec) -> tuple[Any, Any]:
    processor, config = transformers.load_processor(spec)
    if processor.image_processor is None:
        raise CompatibilityError(
            f"model {spec.id!r} ({type(config).__name__}) is text-only, and backend vllm supports image-text-to-text models only: "
            "use --backend transformers for it"
        )
    return processor, config


def teacher_reads_images(spec: TeacherSpec) -> bool:
    return transformers.teacher_reads_images(spec)


def teacher_fingerprint(spec: TeacherSpec, processor: Any, config: Any) -> dict[str, Any]:
    """As that of transformers; ``vllm`` says which version and route. KdcliError where vLLM is not installed."""
    refuse_head(spec, config)
    route = {"version": vllm_version(), "route": spec.vllm_route, "states": STATES[spec.vllm_route]}
    ours = {"attn_implementation": BACKEND, "backend": BACKEND, "vllm": route}
    return {**transformers.teacher_fingerprint(spec, processor, config), **ours}


def refuse_head(spec: TeacherSpec, config: Any) -> None:
    """CompatibilityError where the configuration says that logits are not W·h."""
    text = config.get_text_config()
    for name in NOT_PLAIN:
        if getattr(text, name, None) not in (None, 1):
            raise CompatibilityError(
                f"model {spec.id!r}: {name} in its configuration: logits are not W·h of vLLM's states; not supported"
            )


def load_head(spec: TeacherSpec, processor: Any, config: Any) -> torch.Tensor:
    """W ``[V, D]`` without padding rows, on the CPU, out of the model's files: no engine starts for it."""
    return read_head(spec, config, len(processor.tokenizer), resolve_dtype(spec, config))


class VllmTeacher:
    """Stands where ``TransformersTeacher`` does. ``vocabulary``: the head's width without padding rows."""

    def __init__(self, spec: TeacherSpec, processor: Any, config: Any):
        vllm_version()
        transformers.refuse_compressed(spec, config)
        refuse_head(spec, config)
        self.route, self.dtype, self.device = spec.vllm_route, resolve_dtype(spec, config), resolve_device(spec)
        self.head = load_head(spec, processor, config)
        self.vocabulary = self.head.shape[0]
        self.pad_id = processor.tokenizer.pad_token_id or 0
        self._padding = max(0, int(config.get_text_config().vocab_size) - self.vocabulary)
        self._image_token_id = int(config.image_token_id)
        self._engine = engine(spec, self.dtype, self.device)
        if self.route == "hidden":
            self.head = self.head.to(self.device)
        self._signals = Signals(self.head)

    @property
    def state_bytes(self) -> int:
        """Of one hidden state as it is told."""
        return self.head.shape[1] * self.dtype.itemsize

    def __call__(self, prepared: Sequence[Prepared], wants: Wants) -> list[TeacherOutput]:
        """What the fields want of each row, on the CPU; CompatibilityError for what vLLM cannot give."""
        refuse_wants(wants, self.route)
        if self.route == "hidden":
            return outputs_of_states(self.states(prepared), prepared, wants, self._signals, self.dtype)
        said = self.log_probs(prepared, max(wants.topk.values()))
        return outputs_of_log_probs(said, prepared, wants, self.vocabulary)

    def states(self, prepared: Sequence[Prepared]) -> list[torch.Tensor]:
        """``[T, D]`` of every row, float32 on the CPU: after the final norm, not normalised."""
        from vllm import PoolingParams

        params = PoolingParams(use_activation=False)
        prompts = [prompt_of(one, self._image_token_id) for one in prepared]
        with naming_refusals(f"rows {prepared[0].key} and further"):
            answers = self._engine.encode(prompts, params, pooling_task="token_embed", use_tqdm=False)
        _check(prepared, answers)
        return [answer.outputs.data for answer in answers]

    def log_probs(self, prepared: Sequence[Prepared], k: int) -> list[Said]:
        """Of every row at least the ``k`` likeliest at each token that is none of the head's padding."""
        from vllm import SamplingParams

        entries = min(k, self.vocabulary) + min(self._padding, MOST_PADDING)
        # What it says behind the last token of a prompt is told of the token that it samples there.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=entries,
            logprobs=entries,
            detokenize=False,
            flat_logprobs=True,
        )
        prompts = [prompt_of(one, self._image_token_id) for one in prepared]
        with naming_refusals(f"rows {prepared[0].key} and further"):
            answers = self._engine.generate(prompts, params, use_tqdm=False)
        _check(prepared, answers)
        return [Said(answer.prompt_logprobs, answer.outputs[0].logprobs) for answer in answers]


def _check(prepared: Sequence[Prepared], answers: Sequence[Any]) -> None:
    for one, answer in zip(prepared, answers, strict=True):
        check_expansion(one, answer.prompt_token_ids)
