"""Language models whose decoder layers are known: their attention is computed apart for a few rows, and vision tokens are removed between
them."""

from __future__ import annotations

ATTENTION = {
    "llama": "LlamaAttention",
    "mistral": "MistralAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
}
"""``model_type`` → attention module, whose arithmetic is the one of ``teachers/attention.py``; each is tested against its own eager
attention."""
