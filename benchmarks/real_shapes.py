"""Models and rows of real sizes without any download: random weights from configurations, a padded demo tokenizer, noise pictures.

Teacher: Qwen2-7B behind SigLIP-so400m-384 (27 × 27 = 729 vision tokens); student: Qwen2-0.5B behind the same tower.
"""

from __future__ import annotations

import io
import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

VOCABULARY = 151_646  # Qwen2's tokenizer
IMAGE_SIZE, PATCH = 384, 14
TEXT_TOKENS = 200
LEAST_ROWS = 48
"""Of any world: a calibration wants response tokens twice as many as the teacher is wide."""
QWEN2 = {
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def config(size: str, tokenizer: Any, layers: int | None = None) -> Any:
    """``LlavaConfig`` of ``7B`` or ``0.5B``; ``layers`` cuts every tower (a dry run of the construction)."""
    from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig

    cut = {"num_hidden_layers": layers} if layers else {}
    text = Qwen2Config(
        **QWEN2[size] | cut, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP | cut),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=QWEN2[size]["tie_word_embeddings"],
    )


def build(configuration: Any, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights and a configuration of its own, allocated on its device in its own type from the start."""
    from transformers import AutoModelForImageTextToText

    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(deepcopy(configuration), dtype=dtype)


def processor() -> Any:
    """The demo's tokenizer and chat template, its vocabulary filled up to Qwen2's size with tokens that no text has."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    from benchmarks.demo_training.tokenizer import CHAT_TEMPLATE, load_tokenizer

    tokenizer = load_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    words = description["model"]["vocab"]
    words.update({f"<filler {i}>": i for i in range(len(tokenizer), VOCABULARY)})
    from tokenizers import Tokenizer

    wide = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), **tokenizer.special_tokens_map
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=wide,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def write_rows(folder: Path, rows: int) -> Path:
    """LLaVA json: a 640×480 JPEG a row, a question, and an answer that brings the text to about 200 tokens."""
    from pipelines.demo.world import train_rows

    folder.mkdir(parents=True)
    rng = random.Random(0)
    words = [word for row in train_rows(64, 0) for turn in row.conversations for word in turn["value"].split()]
    words = [word for word in words if word.isalpha()]
    listed = []
    for number in range(rows):
        name = f"{number:06d}.jpg"
        (folder / name).write_bytes(_noise_picture(number))
        answer = " ".join(rng.choices(words, k=TEXT_TOKENS * 7 // 10))
        turns = [
            {"from": "human", "value": "<image>\nWhat is in this picture?"},
            {"from": "gpt", "value": answer},
        ]
        listed.append({"id": f"row-{number}", "image": name, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(listed))
    return path


def _noise_picture(seed: int) -> bytes:
    """Smooth noise: decodes at the cost of a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
