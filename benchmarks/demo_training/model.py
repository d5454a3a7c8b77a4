"""The demo's models: stock ``LlavaForConditionalGeneration``, small enough to ship, 144 vision tokens an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks.demo_training.tokenizer import CHAT_TEMPLATE, load_tokenizer
from pipelines.demo.scenes import IMAGE_SIZE, PATCH
from student_train.load_student import share


@dataclass(frozen=True)
class Size:
    """Widths and depths; everything else is shared by teacher and student."""

    text_width: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_mlp: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int


TEACHER = Size(256, 5, 4, 4, 768, 256, 4, 4, 768)
STUDENT = Size(96, 3, 4, 4, 256, 80, 3, 2, 256)


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model, fp32."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,  # narrow layers: the usual 0.02 starts them too quiet
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(  # type: ignore[call-arg]  # image_token_id: the name that the saved config has
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.copy_(position_table(size.vision_width))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def position_table(width: int) -> torch.Tensor:
    """2-D sine-cosine start of the tower's position table ``[144, width]``, about as loud as the patches themselves.

    The stock start is ten times quieter than a patch of plain background: in our first training the tower never learned
    where anything is (a linear probe for the place of a shape stayed at chance).
    """
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(IMAGE_SIZE // PATCH)[:, None] * frequencies  # [12, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [12, width / 2]
    rows, columns = waves[:, None].expand(-1, len(waves), -1), waves[None].expand(len(waves), -1, -1)
    return 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    """Expands every ``<image>`` into 144 placeholders and scales pixels to [-1, 1]."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer or load_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def normalised(pixels_u8: torch.Tensor) -> torch.Tensor:
    """``uint8 [N, 96, 96, 3]`` -> ``float [N, 3, 96, 96]`` in [-1, 1], exactly as the processor does."""
    return pixels_u8.permute(0, 3, 1, 2).float() / 127.5 - 1


def vision_embeddings(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Projected vision tokens ``[N, 144, D_text]``."""
    return torch.stack(list(model.model.get_image_features(pixel_values, return_dict=True).pooler_output))


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters with tied ones counted once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def export(model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a normal Hugging Face folder in half precision: weights, configuration, processor, chat template."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.to(dtype=dtype).save_pretrained(folder)  # type: ignore[call-arg]
    model.float().load_state_dict(state)  # the caller goes on training in full precision
    build_processor().save_pretrained(folder)
    share(folder.glob("*.safetensors"))
