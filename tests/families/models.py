"""A tiny model of every family: one entry here, and every test of the folder runs over it.

Each is the family's own configuration, processor class, special tokens and style of chat template with random weights and the demo's
tokenizer. An image is never more than some dozen pixels to a model, so that tiles, merging and newlines are there and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

USER_AND_ANSWER = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""As ChatML does it: a newline that is no label stands behind every turn."""

Views = list[tuple[tuple[int, int, int, int], tuple[int, int], bool, int]]
"""(crop, grid, newline a row, tail) of every view of an image."""


@dataclass(frozen=True)
class Family:
    """A family and what it must make of the images of ``rows.py``.

    Attributes:
        build: (text width, head rows, seed) → (configuration, processor).
        image_token: by string, in what the model reads; ``placeholder``: in what the template writes, where that is another.
        marks: what the processor writes around an image, or ``written``, of an image of these views, where it writes more than that, with
            these special tokens (``around``) in it.
        arguments: further keywords of the family's own processor, beside images.
        views: by image (``square`` 48 × 48, ``wide`` 96 × 40, ``tall`` 32 × 88), and ``pair``: each of two square ones in a row.
        zeroed: names of the vision tower's attention outputs: without them a token sees its own patch alone.
    """

    name: str
    build: Callable[[int, int, int], tuple[Any, Any]]
    image_token: str
    views: Mapping[str, Views]
    zeroed: tuple[str, ...]
    marks: tuple[str, str] = ("", "")
    written: Callable[[Views], str] | None = None
    around: tuple[str, ...] = ()
    placeholder: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def text_of(self, views: Views) -> str:
        """The text that stands for an image, without its image tokens."""
        return self.written(views) if self.written else "".join(self.marks)


def tokenizer_with(tokens: tuple[str, ...] = (), folder: Path | None = None, **named: str) -> Any:
    """The demo's tokenizer (or that of ``folder``) and a family's special tokens, ``named`` ones as attributes of it."""
    from transformers import PreTrainedTokenizerFast

    from benchmarks.demo_training.tokenizer import TOKENIZER_FOLDER

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder or TOKENIZER_FOLDER, extra_special_tokens=named)
    known = tokenizer.get_vocab()
    wanted = [token for token in (*tokens, *named.values()) if token not in known]
    if wanted:
        kept = tokenizer.additional_special_tokens if hasattr(tokenizer, "additional_special_tokens") else []
        tokenizer.add_special_tokens({"additional_special_tokens": [*kept, *wanted]})
    return tokenizer


def text_sizes(width: int, tokenizer: Any, extra_rows: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + extra_rows,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_sizes(image: int, patch: int) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": image, "patch_size": patch, "initializer_range": 0.2}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def template(image: str) -> str:
    return USER_AND_ANSWER.replace("IMAGE", image)


def llava(width: int, extra_rows: int, seed: int) -> tuple[Any, Any]:
    """LLaVA-1.5: one cropped square, the class token dropped."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokenizer = tokenizer_with()
    config = LlavaConfig(
        text_config=LlamaConfig(**text_sizes(width, tokenizer, extra_rows)),
        vision_config=CLIPVisionConfig(**vision_sizes(24, 4)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=36,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square(24))
    return config, LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n"),
    )


def llava_next(width: int, extra_rows: int, seed: int, text: str = "Llama") -> tuple[Any, Any]:
    """LLaVA-NeXT: 4 × 4 a tile, an overview and up to 2 × 2 tiles."""
    import transformers
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor

    tokenizer = tokenizer_with()
    pinpoints = [[16, 32], [32, 16], [32, 32], [16, 48]]
    config = LlavaNextConfig(
        text_config=getattr(transformers, f"{text}Config")(**text_sizes(width, tokenizer, extra_rows)),
        vision_config=CLIPVisionConfig(**vision_sizes(16, 4)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=square(16), image_grid_pinpoints=pinpoints
    )
    return config, LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\\n"),
    )


def onevision(width: int, extra_rows: int, seed: int) -> tuple[Any, Any]:
    """OneVision: an odd 5 × 5 a tile (27 × 27 in earnest), shrunk beyond four tiles (``anyres_max_4``)."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = tokenizer_with(("<video>",))
    pinpoints = [[20 * rows, 20 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_sizes(width, tokenizer, extra_rows)),
        vision_config=SiglipVisionConfig(**vision_sizes(20, 4), vision_use_head=False),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_4",
    )
    return config, LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square(20), image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=square(20)),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=template("<image>\\n"),
    )


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen(kind: str, width: int, extra_rows: int, seed: int) -> tuple[Any, Any]:
    """Qwen2.5-VL and Qwen3-VL: 2 × 2 patches of 4 pixels a token, between 2 and 40 tokens an image; M-RoPE."""
    import transformers
    from transformers import Qwen2VLImageProcessor

    tokenizer = tokenizer_with(QWEN_TOKENS)
    is_25 = kind == "Qwen2_5_VL"
    own = (
        {"window_size": 16, "fullatt_block_indexes": [1]}
        if is_25
        else {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    )
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    text = text_sizes(width, tokenizer, extra_rows)
    head = width // text["num_attention_heads"]
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [head // 2 - 2 * (head // 8), head // 8, head // 8],
    }
    if not is_25:
        text |= {"head_dim": head}
        rope |= {"mrope_interleaved": True}
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), QWEN_TOKENS
        )
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, **own, "out_hidden_size": width, "initializer_range": 0.2},
        tie_word_embeddings=False,
        **ids,
    )
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, size={"shortest_edge": 2 * 64, "longest_edge": 40 * 64})
    video = transformers.Qwen2VLVideoProcessor if is_25 else transformers.Qwen3VLVideoProcessor
    return config, getattr(transformers, f"{kind}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=video(patch_size=4, merge_size=2),
        chat_template=template(QWEN_IMAGE),
    )


def internvl(width: int, extra_rows: int, seed: int) -> tuple[Any, Any]:
    """InternVL3: 2 × 2 a tile of 16 pixels (16 × 16 of 448), up to six tiles and a thumbnail, marks around each image."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    tokenizer = tokenizer_with(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**text_sizes(width, tokenizer, extra_rows)),
        vision_config={**vision_sizes(16, 4), "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return config, InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square(16), min_patches=1, max_patches=6),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=square(16)),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\\n"),
    )


SPLIT_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
SPLIT_TOKENS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))


def split(kind: str, width: int, extra_rows: int, seed: int) -> tuple[Any, Any]:
    """Idefics 3 and SmolVLM: 2 × 2 a tile of 16 pixels (8 × 8 of 512), tiles between marks, the whole image last."""
    import transformers
    from transformers import LlamaConfig

    tokenizer = tokenizer_with(SPLIT_TOKENS)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    given: dict[str, Any] = {}
    if kind == "SmolVLM":
        given["video_processor"] = transformers.SmolVLMVideoProcessor(
            **sizes, video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}}
        )
    processor = getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{kind}ImageProcessor")(**sizes),
        tokenizer,
        **given,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config=LlamaConfig(**text_sizes(width, tokenizer, extra_rows)),
        vision_config=vision_sizes(16, 4),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


GEMMA_PANNED = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 8,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


GEMMA_NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def gemma3(width: int, extra_rows: int, seed: int, tokenizer: Any = None) -> tuple[Any, Any]:
    """Gemma 3: 3 × 3 a view (16 × 16), the whole image and up to three crops, each between marks; a window of 24 tokens in one of two
    layers. tokenizer: in place of the demo's."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig, SiglipVisionConfig

    tokenizer = tokenizer or tokenizer_with(**GEMMA_NAMED)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_NAMED.items()}
    head = width // 2
    text = {
        **text_sizes(width, tokenizer, extra_rows),
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=SiglipVisionConfig(**vision_sizes(24, 4), vision_use_head=False),
        mm_tokens_per_image=9,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )
    return config, Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=square(24), **GEMMA_PANNED),
        tokenizer=tokenizer,
        image_seq_length=9,
        chat_template=template("<start_of_image>"),
    )


def panned_text(views: Views) -> str:
    """Each view between its marks; before crops, words that say what they are."""
    one = "\n\n<start_of_image><end_of_image>\n\n"
    if len(views) == 1:
        return one
    crops = " ".join([one] * (len(views) - 1))
    return f"Here is the original image {one} and here are some crops to help you see better {crops}"


def split_text(views: Views) -> str:
    """``<row_1_col_1>`` and so on: a mark before every tile, a line a row of tiles, and the whole image behind an empty line."""
    fake, whole = SPLIT_TOKENS[0], "".join(SPLIT_TOKENS[index] for index in (0, 1, 0))
    tops = sorted({crop[1] for crop, *_ in views[:-1]})
    rows = [[crop for crop, *_ in views[:-1] if crop[1] == top] for top in tops]
    lines = [
        "".join(f"{fake}<row_{number}_col_{column}>" for column in range(1, len(row) + 1)) + "\n"
        for number, row in enumerate(rows, 1)
    ]
    return "".join(lines) + ("\n" if lines else "") + whole


def model_of(config: Any, seed: int) -> Any:
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for name, parameter in model.named_parameters():
            # Gemma 3's projection begins at zero: no picture would change anything.
            if name.endswith("mm_input_projection_weight"):
                parameter.data.normal_(std=0.5)
        return model


def build_folder(family: Family, folder: Path, width: int = 32, extra_rows: int = 5, seed: int = 1) -> Path:
    """A Hugging Face folder of the family; ``extra_rows`` of the head beyond the tokenizer."""
    config, processor = family.build(width, extra_rows, seed)
    model_of(config, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


WHOLE = {"square": (0, 0, 48, 48), "wide": (0, 0, 96, 40), "tall": (0, 0, 32, 88)}


def one_view(grids: Mapping[str, tuple[int, int]]) -> dict[str, Views]:
    """Every image as a whole."""
    views: dict[str, Views] = {name: [(WHOLE[name], grid, False, 0)] for name, grid in grids.items()}
    return {**views, "pair": views["square"]}


def anyres(side: int, grids: Mapping[str, tuple[int, int]]) -> dict[str, Views]:
    """An overview of ``side`` × ``side`` and one grid of all tiles, newlines in it."""
    return {name: [(WHOLE[name], (side, side), False, 0), (WHOLE[name], grid, True, 0)] for name, grid in grids.items()}


def tiles(boxes: list[tuple[int, int, int, int]], whole: tuple[int, int, int, int]) -> Views:
    return [(box, (2, 2), False, 0) for box in [*boxes, whole]]


NEXT_VIEWS = anyres(4, {"square": (8, 8), "wide": (4, 10), "tall": (8, 2)})
ONEVISION_VIEWS = anyres(5, {"square": (10, 10), "wide": (6, 15), "tall": (15, 6)})
ONEVISION_VIEWS["pair"] = [(WHOLE["square"], (5, 5), False, 1)]
LLAVA_VIEWS: dict[str, Views] = {
    "square": [(WHOLE["square"], (6, 6), False, 0)],
    "wide": [((28, 0, 68, 40), (6, 6), False, 0)],
    "tall": [((0, 28, 32, 60), (6, 6), False, 0)],
}
INTERNVL_VIEWS: dict[str, Views] = {
    "square": tiles([(0, 0, 24, 24), (24, 0, 48, 24), (0, 24, 24, 48), (24, 24, 48, 48)], WHOLE["square"]),
    "wide": tiles([(0, 0, 48, 40), (48, 0, 96, 40)], WHOLE["wide"]),
    "tall": tiles([(0, 0, 32, 29), (0, 29, 32, 58), (0, 58, 32, 88)], WHOLE["tall"]),
}
SPLIT_VIEWS: dict[str, Views] = {**INTERNVL_VIEWS, "tall": tiles([(0, 0, 32, 44), (0, 44, 32, 88)], WHOLE["tall"])}
GEMMA_VIEWS: dict[str, Views] = {
    name: [(box, (3, 3), False, 0) for box in (WHOLE[name], *crops)]
    for name, crops in {
        "square": [],
        "wide": [(0, 0, 48, 40), (48, 0, 96, 40)],
        "tall": [(0, 0, 32, 30), (0, 30, 32, 60), (0, 60, 32, 88)],
    }.items()
}
CLIP_OUT, QWEN_OUT = ("out_proj",), ("attn.proj",)

FAMILIES = {
    family.name: family
    for family in (
        Family("llava-1.5", llava, "<image>", {**LLAVA_VIEWS, "pair": LLAVA_VIEWS["square"]}, CLIP_OUT),
        Family("llava-next", llava_next, "<image>", {**NEXT_VIEWS, "pair": NEXT_VIEWS["square"]}, CLIP_OUT),
        Family("llava-onevision", onevision, "<image>", ONEVISION_VIEWS, CLIP_OUT),
        Family(
            "qwen2.5-vl",
            lambda *given: qwen("Qwen2_5_VL", *given),
            "<|image_pad|>",
            one_view({"square": (6, 6), "wide": (4, 9), "tall": (10, 3)}),
            QWEN_OUT,
        ),
        Family(
            "qwen3-vl",
            lambda *given: qwen("Qwen3VL", *given),
            "<|image_pad|>",
            one_view({"square": (6, 6), "wide": (4, 9), "tall": (10, 3)}),
            QWEN_OUT,
        ),
        Family(
            "internvl3",
            internvl,
            "<IMG_CONTEXT>",
            {**INTERNVL_VIEWS, "pair": INTERNVL_VIEWS["square"]},
            ("projection_layer",),
            ("<img>", "</img>"),
        ),
        *(
            Family(
                name,
                partial(split, kind),
                "<image>",
                {**SPLIT_VIEWS, "pair": SPLIT_VIEWS["square"]},
                ("out_proj",),
                written=split_text,
                around=SPLIT_TOKENS,
            )
            for name, kind in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
            if kind == "Idefics3" or find_spec("num2words")  # what SmolVLM's processor wants for videos
        ),
        Family(
            "gemma-3",
            gemma3,
            "<image_soft_token>",
            {**GEMMA_VIEWS, "pair": GEMMA_VIEWS["square"]},
            CLIP_OUT,
            written=panned_text,
            around=("<start_of_image>", "<end_of_image>"),
            placeholder="<start_of_image>",
            arguments={"images_kwargs": GEMMA_PANNED},
        ),
    )
}
