"""Write the real teacher's folder, or a student's start: the same with fewer layers of the language model.

python -m benchmarks.real_teacher --language runs/smollm2 --out runs/real_teacher
python -m benchmarks.real_teacher --language runs/smollm2 --layers 15 --out runs/real_student
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_teacher import compose, vision
from benchmarks.text_student import with_fewer_layers


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, default=None, help="the vision tower; default: that of the package")
    parser.add_argument(
        "--language", type=Path, default=Path("runs/smollm2"), help="`make real-text-teacher` writes it"
    )
    parser.add_argument("--projector", type=Path, default=compose.PROJECTOR)
    parser.add_argument("--untrained", action="store_true", help="leave the projector as it is made")
    parser.add_argument(
        "--compare", action="store_true", help="compare the tower with onnxruntime (which must be installed)"
    )
    parser.add_argument("--layers", type=int, default=None, help="of the language model; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/real_teacher"))
    return parser.parse_args(arguments)


def assemble(options: argparse.Namespace) -> dict[str, Any]:
    """Convert, compose, write; what is told of the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    onnx = options.onnx or vision.packaged()
    tower = vision.load_vision(onnx)
    told: dict[str, Any] = {"folder": str(options.out)}
    torch.manual_seed(0)
    if options.compare:
        told["vision_difference"] = vision.difference(onnx, tower, torch.randn(4, 3, 224, 224))
    language = AutoModelForCausalLM.from_pretrained(options.language, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.language)
    model = compose.compose(tower, language, tokenizer)
    if not options.untrained:
        compose.load_projector(model, options.projector)
    if options.layers is not None:
        model = with_fewer_layers(model, options.layers)
    compose.write_folder(model, tokenizer, options.out)
    text = model.config.text_config
    return {
        **told,
        "vision": {"layers": tower.config.num_hidden_layers, "width": tower.config.hidden_size},
        "vision_tokens": model.config.image_seq_length,
        "language": {"layers": text.num_hidden_layers, "width": text.hidden_size, "head": text.vocab_size},
        "tokenizer": len(tokenizer),
        "parameters": model.num_parameters(),
        "projector": sum(one.numel() for one in model.model.multi_modal_projector.parameters()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    print(json.dumps(assemble(parse(arguments))))


if __name__ == "__main__":
    main()
