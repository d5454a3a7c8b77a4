"""What vLLM's attention takes of an exported student: sizes of attention heads, as of vLLM 0.32."""

from __future__ import annotations

from typing import Any

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""``CPU_ATTN``, the only attention of its CPU build (vllm/v1/attention/backends/cpu_attn.py)."""
FLASH_STEP, FLASH_MOST = 8, 256
"""``FLASH_ATTN`` on CUDA takes multiples up to here; other sizes go to ``TRITON_ATTN`` (from 32 on) or ``FLEX_ATTENTION`` (any)."""


def head_size(config: Any) -> int:
    """Of the language model: width of one attention head."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def serving_notes(config: Any) -> list[str]:
    """A line for each kind of machine on which vLLM has trouble with the head size; none for the usual sizes."""
    size = head_size(config)
    notes = []
    if size not in CPU_HEADS:
        listed = ", ".join(map(str, CPU_HEADS))
        notes.append(
            f"vLLM does not serve its attention heads of {size} on a CPU, where it knows {listed} (docs/export.md)"
        )
    if size % FLASH_STEP or size > FLASH_MOST:
        notes.append(
            f"on a GPU vLLM serves its attention heads of {size} without FlashAttention, which takes multiples of {FLASH_STEP} up to "
            f"{FLASH_MOST}: slower (docs/export.md)"
        )
    return notes
