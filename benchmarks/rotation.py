"""What does rotating hidden states before rounding buy on a real language model? Versions 1 and 2 of ``int8`` and ``int4``.

    python -m benchmarks.rotation --model FOLDER [--gguf FILE] [--text docs/*.md] [--save]

Small models that are trained on demo data have no outlying dimensions; any released language model has. Its states on the text go
through the real field, in records of 8, 64 and 256 rows (from 16 rows on version 2 stores their mean). Columns: payload bytes a row, mean
KL(p‖p̂) in nats and its 95th percentile. The reference run is SmolLM2-135M-Instruct (D = 576, V = 49,152).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import argument_parser, finish, machine, print_table
from teacher_cache.codecs import container
from teacher_cache.fields import create_field
from teacher_cache.records import TeacherOutput

BLOCK = 256
CONFIGURATIONS = [
    (codec, version, rows)
    for codec in ("int8", "int4")
    for version, sizes in ((1, (64,)), (2, (8, 64, 256)))
    for rows in sizes
]


@torch.inference_mode()
def states(options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states after the final norm ``[R, D]``, head ``[V, D]``) of the model on the text, block by block."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = {"gguf_file": options.gguf} if options.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **own)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **own).eval()
    text = "\n\n".join(path.read_text() for path in options.text)
    ids = torch.tensor(tokenizer(text)["input_ids"][: options.tokens // BLOCK * BLOCK]).split(BLOCK)
    hidden = torch.cat([model.model(one[None]).last_hidden_state[0] for one in ids])
    return hidden, model.get_output_embeddings().weight


def through(hidden: torch.Tensor, codec: str, version: int, rows: int) -> tuple[torch.Tensor, float]:
    """(what a reader gets ``[R, D]``, payload bytes a row) of records of so many rows."""
    field = create_field("response_hidden", {"codec": codec, "codec_version": version})
    read, size = [], 0
    for one in hidden.split(rows):
        stored = field.encode(None, TeacherOutput({"response": one}))  # type: ignore[arg-type]
        size += sum(tensor.nbytes for tensor in stored.values())
        read.append(field.decode(container.unpack(container.pack(stored))))
    return torch.cat(read), size / len(hidden)


@torch.inference_mode()
def divergences(hidden: torch.Tensor, head: torch.Tensor, coded: list[torch.Tensor]) -> list[torch.Tensor]:
    """KL(p‖p̂) ``[R]`` of each coded form; the truth is made once for all of them."""
    found: list[list[torch.Tensor]] = [[] for _ in coded]
    for start in range(0, len(hidden), BLOCK):
        rows = slice(start, start + BLOCK)
        truth = torch.log_softmax(hidden[rows] @ head.T, dim=1)
        for kl, one in zip(found, coded):
            ours = torch.log_softmax(one[rows] @ head.T, dim=1)
            kl.append((truth.exp() * (truth - ours)).sum(dim=1))
    return [torch.cat(kl) for kl in found]


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model of transformers")
    parser.add_argument("--gguf", help="its GGUF file (needs the packages gguf and accelerate)")
    parser.add_argument("--text", type=Path, nargs="+", default=sorted(Path("docs").glob("*.md")))
    parser.add_argument("--tokens", type=int, default=3072)
    options = parser.parse_args()
    body: dict[str, Any] = {"machine": machine("cpu"), "shapes": "text"}
    hidden, head = states(options)
    middle = hidden.abs().median(dim=0).values
    body |= {"rows": len(hidden), "width": hidden.shape[1], "vocabulary": len(head)}
    body["dimensions over the median"] = [
        round(float(one), 1) for one in (middle / middle.median()).sort(descending=True).values[:8]
    ]
    made = [through(hidden, *one) for one in CONFIGURATIONS]
    found = divergences(hidden, head, [one for one, _ in made])
    results = [
        {
            "codec": codec,
            "version": version,
            "record": rows,
            "bytes": size,
            "kl": float(kl.mean()),
            "kl_p95": float(kl.quantile(0.95)),
        }
        for (codec, version, rows), (_, size), kl in zip(CONFIGURATIONS, made, found)
    ]
    print_table(
        ["codec", "version", "rows a record", "B/row", "KL nats", "p95"],
        [
            [r["codec"], r["version"], r["record"], f"{r['bytes']:.1f}", f"{r['kl']:.5f}", f"{r['kl_p95']:.5f}"]
            for r in results
        ],
    )
    finish("rotation", {**body, "results": results}, options.save)


if __name__ == "__main__":
    main()
