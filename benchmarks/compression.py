"""What do fewer vision tokens save at inference? Compressors in the projector's place, and operators inside the language model.

Per variant, one prompt with one image, batch 1: vision tokens that enter the language model (and that its last layer sees), time to the
first token (vision tower, projector and the whole prefill; the picture is already pixels on the device), bytes of the keys and values
after the prompt, floating-point operations of the prompt. ``none`` is the student as it is; ratios are to it, inside each repeat.

    python -m benchmarks.compression [--repeats 5] [--save]
    python -m benchmarks.compression --device cuda --shapes real

Weights do not matter here: fresh compressors are untrained. Every variant ends at the same number of vision tokens
(``--vision-tokens``; default 36 of the demo's 144, 81 of the real 729: whole windows of 27 × 27). Operators drop them before layer
``--layer`` of the language model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import argument_parser, finish, interleave, machine, median_ratio, print_table, spread, timed
from benchmarks.worlds import World, open_world
from student_train.compression import install, settle, with_grid
from student_train.compressors import CompressorSpec, compressor_modules
from student_train.pruning import Pruning, operator_modules
from student_train.pruning.forward import prune_vision

NONE = "none"
TOKENS, LAYER = {"demo": 36, "real": 81}, {"demo": 1, "real": 2}
QUESTION = "What is in this picture? Answer with one sentence."
WARM_UPS = 2


@dataclass(frozen=True)
class Variant:
    """One way to answer the prompt. pruning: inside the language model."""

    kind: str
    model: Any
    inputs: dict[str, torch.Tensor]
    pruning: Pruning | None = None

    @torch.inference_mode()
    def prefill(self) -> tuple[Any, int]:
        """(the cache after the prompt, vision tokens that its last layer keeps)."""
        context = prune_vision(self.model, self.pruning) if self.pruning else nullcontext()
        vision = self.inputs["input_ids"] == self.model.config.image_token_id
        with context as pruned:
            cache = self.model(**self.inputs, use_cache=True, logits_to_keep=1).past_key_values
            left = vision[0, pruned.positions[0][pruned.positions[0] >= 0]] if pruned else vision
        return cache, int(left.sum())

    def seconds(self, device: str) -> float:
        return timed(self.prefill, device)

    def flops(self) -> int:
        """Of the prompt; attention as plain products, which the counter knows on every device."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.prefill()
        return counter.get_total_flops()

    def describe(self) -> dict[str, Any]:
        cache, last = self.prefill()
        entering = int((self.inputs["input_ids"] == self.model.config.image_token_id).sum())
        stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return {
            "kind": self.kind,
            "vision_tokens": entering,
            "vision_tokens_of_last_layer": last,
            "kv_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
            "flops": self.flops(),
        }


def parse(arguments: Sequence[str] | None) -> Any:
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--vision-tokens", type=int, default=0, help="that every variant ends at; 0: 36 (demo), 81 (real)"
    )
    parser.add_argument(
        "--layer", type=int, default=0, help="before which operators drop tokens; 0: 1 (demo), 2 (real)"
    )
    parser.add_argument("--prompts", type=int, default=10, help="prompts timed in one repeat")
    options = parser.parse_args(arguments)
    options.vision_tokens = options.vision_tokens or TOKENS[options.shapes]
    options.layer = options.layer or LAYER[options.shapes]
    return options


def ask(processor: Any, model: Any, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The prompt, on its device."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = Image.effect_noise((640, 480), 90).convert("RGB")
    inputs = processor(text=[text], images=[picture], return_tensors="pt", add_special_tokens=False).to(device)
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}


def build_variants(options: Any, world: World) -> dict[str, Variant]:
    """``none`` first; operators share its weights."""
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    place = partial(_placed, device=options.device, dtype=dtype)
    stock = place(world.student())
    prompt = ask(world.processor, stock, options.device, dtype)
    variants = {NONE: Variant(NONE, stock, prompt)}
    for name in sorted(compressor_modules()):
        model = world.student()
        spec = settle(CompressorSpec(name, options.vision_tokens), model.config, world.processor, "the student")
        assert spec is not None
        torch.manual_seed(0)
        install(model, spec)
        inputs = ask(with_grid(world.processor, spec), model, options.device, dtype)
        variants[name] = Variant("compressor", place(model), inputs)
    for name in sorted(operator_modules()):
        pruning = Pruning(name, layer=options.layer, keep=options.vision_tokens)
        variants[name] = Variant("operator", stock, prompt, pruning)
    return variants


def _placed(model: Any, device: str, dtype: torch.dtype) -> Any:
    return model.to(device, dtype).eval().requires_grad_(False)


def measure(options: Any, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
    """What every variant costs; seconds are of one prompt."""

    def prompts(variant: Variant) -> float:
        return sum(variant.seconds(options.device) for _ in range(options.prompts)) / options.prompts

    runs: dict[str, Callable[[], float]] = {name: partial(prompts, variant) for name, variant in variants.items()}
    for variant in variants.values():
        for _ in range(WARM_UPS):
            variant.prefill()
    seconds = interleave(runs, options.repeats)
    table = {}
    for name, variant in variants.items():
        body = variant.describe()
        body |= {"seconds": spread(seconds[name]), "ttft_ratio": round(median_ratio(seconds[name], seconds[NONE]), 4)}
        table[name] = body
    for body in table.values():
        body |= {f"{what}_ratio": round(body[what] / table[NONE][what], 4) for what in ("kv_bytes", "flops")}
    return table


def report(body: dict[str, Any]) -> None:
    header = ("variant", "kind", "vision tokens", "last layer", "TTFT ms", "ratio", "KV KiB", "ratio", "GFLOP", "ratio")
    lines = [
        (
            name,
            one["kind"],
            one["vision_tokens"],
            one["vision_tokens_of_last_layer"],
            f"{1e3 * one['seconds'][1]:.2f}",
            f"{one['ttft_ratio']:.3f}",
            f"{one['kv_bytes'] / 1024:.1f}",
            f"{one['kv_bytes_ratio']:.3f}",
            f"{one['flops'] / 1e9:.3f}",
            f"{one['flops_ratio']:.3f}",
        )
        for name, one in body["variants"].items()
    ]
    print_table(header, lines)
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    described = machine(options.device)
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(options, Path(folder), 4)
        variants = build_variants(options, world)
        prompt = variants[NONE].inputs["input_ids"].shape[1] - world.image_tokens
        body = {
            "machine": described,
            "shapes": options.shapes,
            "models": world.describe(),
            "text_tokens": prompt,
            "layer": options.layer,
            "repeats": options.repeats,
            "prompts_a_repeat": options.prompts,
            "variants": measure(options, variants),
        }
    report(body)
    finish("compression", body, options.save)


if __name__ == "__main__":
    main()
