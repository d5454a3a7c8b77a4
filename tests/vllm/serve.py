"""Answers a question about a made picture from an exported folder, by transformers and by vLLM, in a process of its own.

``python serve.py FOLDER auto|transformers`` prints ``{"transformers": ids, "vllm": ids, "prompt": [tokens, tokens]}``, greedy, in float32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

TOKENS = 12


def question(folder: str) -> tuple[Any, str, Any]:
    """(processor, prompt, picture)"""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return processor, prompt, coarse.resize((320, 200), Image.Resampling.BICUBIC)


def by_transformers(folder: str) -> tuple[list[int], int]:
    """(answer, prompt tokens)"""
    import torch
    from transformers import AutoModelForImageTextToText

    processor, prompt, picture = question(folder)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt", add_special_tokens=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    said = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    asked = inputs["input_ids"].shape[1]
    return said[0, asked:].tolist(), asked


def by_vllm(folder: str, implementation: str) -> tuple[list[int], int]:
    from vllm import LLM, SamplingParams

    _, prompt, picture = question(folder)
    trusted = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=trusted,
        model_impl=implementation,
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=512,
        limit_mm_per_prompt={"image": 1},
    )
    asked = {"prompt": prompt, "multi_modal_data": {"image": picture}}
    (said,) = engine.generate([asked], SamplingParams(max_tokens=TOKENS, temperature=0))
    return list(said.outputs[0].token_ids), len(said.prompt_token_ids)


if __name__ == "__main__":
    folder, implementation = sys.argv[1:]
    ours, asked = by_transformers(folder)
    theirs, read = by_vllm(folder, implementation)
    print(json.dumps({"transformers": ours, "vllm": theirs, "prompt": [asked, read]}))
