"""How much memory does a capture take where rows are large: 7,290 vision tokens × 3,584, as LLaVA-OneVision-7B has them of one picture?

The null teacher says hidden states of that shape (bfloat16, ``--store exact``) of pictures that become ten views of 384 × 384. Processor
and configuration are LLaVA-NeXT's with these sizes, since OneVision's own need torchvision. The whole command runs in a process of its
own, whose peak is noted; 256 such rows, as a window had them before it was bounded by bytes, are 18 GB.

    python -m benchmarks.capture_memory --save             # minutes, and some GB below the temporary folder
    python -m benchmarks.capture_memory --rows 8           # a try

The limit: three windows of ``WINDOW_BYTES`` (one prepared, one with the teacher, one being written), and 1 GiB for program, model and the
row in hand.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from benchmarks.common import argument_parser, finish, machine, print_table
from benchmarks.memory import watched
from teacher_cache.capturing.window_bytes import WINDOW_BYTES

SIDE, PATCH, TILES, WIDTH = 384, 14, 3, 3584
VISION_TOKENS = (SIDE // PATCH) ** 2 * (TILES**2 + 1)
"""Of one picture, as many as it has patches; LLaVA-NeXT's newlines come on top."""
PICTURES = 4
PROGRAM_MIB = 1024
LIMIT_MIB = 3 * WINDOW_BYTES // 2**20 + PROGRAM_MIB


def write_model(folder: Path, width: int, side: int) -> None:
    """Configuration and processor; the null teacher asks for no weights."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        Qwen2Config,
    )

    from benchmarks.demo_training.tokenizer import CHAT_TEMPLATE, load_tokenizer

    tokenizer, pinpoints = load_tokenizer(), [[TILES * side, TILES * side]]
    tower = CLIPVisionConfig(hidden_size=1152, image_size=side, patch_size=PATCH)
    text = Qwen2Config(vocab_size=len(tokenizer), hidden_size=width, pad_token_id=tokenizer.pad_token_id)
    image = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"image_grid_pinpoints": pinpoints, "image_seq_length": (side // PATCH) ** 2}
    LlavaNextConfig(
        text_config=text, vision_config=tower, image_token_id=image, vision_feature_select_strategy="full", **sizes
    ).save_pretrained(folder)
    square = {"height": side, "width": side}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_rows(folder: Path, rows: int, side: int) -> Path:
    """A json of rows with one picture each, of a few that are square and fill every tile."""
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (TILES * side // 8, TILES * side // 8, 3), np.uint8)
        PIL.Image.fromarray(noise).resize((TILES * side, TILES * side)).save(folder / f"{number}.jpg", quality=90)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Coloured squares."}]
    body = [{"id": str(n), "image": f"{n % PICTURES}.jpg", "conversations": turns} for n in range(rows)]
    (folder / "rows.json").write_text(json.dumps(body))
    return folder / "rows.json"


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Peak and seconds of one whole ``cache-teacher``, and what its rows are."""
    from teacher_cache.reading.cache import TeacherCache

    write_model(folder / "teacher", options.width, options.side)
    data, out = write_rows(folder, options.rows, options.side), folder / "cache"
    words = ["cache-teacher", "--teacher", f"null:{folder / 'teacher'}", "--data", str(data), "--out", str(out)]
    words += ["--store", "exact", "--dtype", "bfloat16", "--shards", "1", "--workers", "1", "--device", "cpu"]
    words += ["--encode-workers", str(options.encode_workers)]
    done = watched([sys.executable, "-m", "cli", *words, "--max-length", "16384"])
    (first, *_) = TeacherCache(str(out)).column("samples").entries(0)
    tar = sum(file.stat().st_size for file in out.rglob("*.tar"))
    return {
        "vision_tokens": first.vision_rows,
        "row_mib": round(tar / options.rows / 2**20, 1),
        "peak_mib": round(done.largest_mib),
        "seconds": round(done.seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--width", type=int, default=WIDTH, help="of hidden states")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of a view")
    parser.add_argument("--encode-workers", type=int, default=4)
    options = parser.parse_args(arguments)
    described = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    body = {
        "machine": described,
        "shapes": f"{VISION_TOKENS} x {options.width}" if options.side == SIDE else "small",
        "rows": options.rows,
        "encode_workers": options.encode_workers,
        "window_mib": WINDOW_BYTES // 2**20,
        "limit_mib": LIMIT_MIB,
        **found,
    }
    print_table(("", ""), [(name, body[name]) for name in ("rows", *found, "window_mib", "limit_mib")])
    print("within the limit" if found["peak_mib"] <= LIMIT_MIB else "MORE THAN THE LIMIT")
    finish("capture_memory", body, options.save)


if __name__ == "__main__":
    main()
