"""Two ends and a projector → the folder of a LLaVA: weights in bfloat16, configuration, processor, tokenizer, chat template.

A picture becomes 8 × 8 patches of 14 pixels: 64 vision tokens of the ninth layer, without the class token. LLaVA in transformers
has no pooling, and a CPU shall be able to run this teacher, so a picture is made small instead: 112 pixels, squarely cropped as CLIP's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PROJECTOR = Path(__file__).with_name("projector.safetensors")
IMAGE_SIZE = 112  # pixels a side
FEATURE_LAYER = (
    -4
)  # linear probes of a patch read its colour and shape best there: 0.94 and 0.85 right, of the last layer 0.87 and 0.82
PLACEHOLDER = "<image>"
NEVER_SAID = "<filename>"  # SmolLM2's least likely token: the rows that are new begin as this one's
HEAD_UNIT = 64  # rows: the head's width is a multiple, as that of llava-hf's models is
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of DINOv2's pictures
# SmolLM2's own template takes strings only, and begins every talk with a line about SmolLM.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def compose(vision: Any, language: Any, tokenizer: Any) -> Any:
    """``LlavaForConditionalGeneration`` in float32, the projector fresh, the ends copied; the tokenizer learns ``<image>``.

    Args:
        vision: a ``Dinov2Model``. language: a causal language model whose configuration LLaVA takes as its text configuration.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    tokenizer.chat_template = CHAT_TEMPLATE
    head = -(-max(len(tokenizer), language.config.vocab_size) // HEAD_UNIT) * HEAD_UNIT
    text, seen = ({n: v for n, v in one.config.to_dict().items() if n != "_name_or_path"} for one in (language, vision))
    patches = (IMAGE_SIZE // vision.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=seen,
        text_config={**text, "vocab_size": head},
        image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=patches,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",  # the class token is dropped
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = LlavaForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    state = language.state_dict()
    for name in [one for one in state if one.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        state[name] = widened(state[name].float(), head, tokenizer)
    model.model.language_model.load_state_dict(language_body(state))
    model.lm_head.weight.data.copy_(state["lm_head.weight"])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def language_body(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a causal model's body."""
    return {name.removeprefix("model."): one for name, one in state.items() if name.startswith("model.")}


def widened(rows: torch.Tensor, count: int, tokenizer: Any) -> torch.Tensor:
    """``[V, D]`` → ``[count, D]``: new rows are copies of a row that is never said, so that the head stays what it was."""
    pattern = rows[tokenizer.convert_tokens_to_ids(NEVER_SAID)] if NEVER_SAID in tokenizer.get_vocab() else rows.mean(0)
    return torch.cat([rows, pattern.expand(count - len(rows), -1)])


def build_image_processor() -> Any:
    """Squares of 112 pixels: the shorter edge is scaled, the middle is taken."""
    from transformers import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    size = {"shortest_edge": IMAGE_SIZE}
    return CLIPImageProcessorPil(size=size, crop_size=square, image_mean=list(MEAN), image_std=list(STD))


def build_processor(tokenizer: Any, patch: int) -> Any:
    """Pictures by ``build_image_processor``, and as many ``<image>`` as they have patches."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=build_image_processor(),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def load_projector(model: Any, file: Path) -> None:
    """Puts a saved projector into the model.

    Raises:
        ValueError: the file's shapes are not the model's.
    """
    projector, state = model.model.multi_modal_projector, load_file(file)
    shapes = {name: tuple(one.shape) for name, one in projector.state_dict().items()}
    found = {name: tuple(one.shape) for name, one in state.items()}
    if shapes != found:
        raise ValueError(f"{file} has {found}; a projector between these ends has {shapes}: train one for them")
    projector.load_state_dict({name: one.float() for name, one in state.items()})


def save_projector(model: Any, file: Path) -> None:
    """Writes the projector in bfloat16, whole or not at all."""
    state = model.model.multi_modal_projector.state_dict()
    draft = file.with_suffix(".draft")
    save_file({name: one.detach().bfloat16().contiguous() for name, one in state.items()}, draft)
    draft.replace(file)


def write_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """The folder, in bfloat16; the model given is changed to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer, model.config.vision_config.patch_size).save_pretrained(folder)
