"""Loads an exported folder as its users will, with transformers alone, and says how far it is from what was expected.

Run as a script of its own: ``python loaded.py FOLDER ROWS``; nothing of the project is imported. ROWS holds ``rows.json``, the pictures
that it names, and ``expected.safetensors``. Prints one JSON object. Ends with its input, which ends when its parent is killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

NEW_TOKENS = 8


def row_inputs(processor: Any, row: dict[str, Any], rows: Path) -> Any:
    """The processor's tensors for one row of ``rows.json``; of a model that reads text alone, its tokenizer's."""
    tokenizer = getattr(processor, "tokenizer", processor)
    owner = processor if processor.chat_template else tokenizer
    begins = False
    if owner.chat_template:
        text = owner.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        # As in `apply_chat_template(tokenize=True)`: a processor adds the first token unless the template wrote it, a tokenizer does not.
        begins = owner is not tokenizer and not text.startswith(tokenizer.bos_token or "\0")
    else:
        text = row["text"]
    pictures = [Image.open(rows / name).convert("RGB") for name in row["images"]]
    images = {"images": pictures} if pictures else {}
    return processor(text=[text], **images, return_tensors="pt", add_special_tokens=begins)


@torch.inference_mode()
def compare(folder: str, rows: Path) -> dict[str, Any]:
    """Largest differences over all rows, in float32.

    Returns:
        ``{"rows", "tokens": [expected, got] counts where ids differ, "difference", "largest", "generated", "project"}``
    """
    trusted = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    described = json.loads((rows / "rows.json").read_text())
    pictured = any(row["images"] for row in described)
    reading = (AutoProcessor if pictured else AutoTokenizer).from_pretrained
    network = AutoModelForImageTextToText if pictured else AutoModelForCausalLM
    processor = reading(folder, trust_remote_code=trusted)
    model = network.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32, use_safetensors=True).eval()
    expected = load_file(rows / "expected.safetensors")
    found: dict[str, Any] = {"rows": len(described), "tokens": [], "difference": 0.0, "largest": 0.0}
    inputs = []
    for i, row in enumerate(described):
        inputs.append(row_inputs(processor, row, rows))
        ids, wanted = inputs[i]["input_ids"], expected[f"{i}.input_ids"]
        if not torch.equal(ids, wanted):
            found["tokens"].append([wanted.shape[1], ids.shape[1]])
            continue
        logits = model(**inputs[i]).logits
        difference = (logits - expected[f"{i}.logits"]).abs().max().item()
        found["difference"] = max(found["difference"], difference if difference == difference else float("inf"))
        found["largest"] = max(found["largest"], expected[f"{i}.logits"].abs().max().item())
    found["generated"] = 0
    if not found["tokens"]:  # a model does not take a row whose places are not its own
        said = model.generate(**inputs[0], do_sample=False, max_new_tokens=NEW_TOKENS)
        found["generated"] = said.shape[1] - inputs[0]["input_ids"].shape[1]
    own = {"cli", "pipelines", "student_train", "teacher_cache"}
    found["project"] = sorted(own & {name.split(".")[0] for name in sys.modules})
    return found


def end_with_input() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    print(json.dumps(compare(sys.argv[1], Path(sys.argv[2]))))
