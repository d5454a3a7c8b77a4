"""A compressor in a LLaVA-1.5 or LLaVA-NeXT student: settled before any weights are read, installed, saved and read back.

The configuration's entry ``kdcli_compressor`` says what the folder holds. The processor is the stock one but for the number of
placeholders of an image, which is why a saved folder has a stock processor beside that entry.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from student_train.compressed_processor import compress_processor
from student_train.compressors import CompressorSpec, Site, compressor_module
from student_train.config import TrainSettings
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.families import families, family_named, family_of
from teacher_cache.models.loading import attending
from teacher_cache.preparing.layout import COMPRESSED
from teacher_cache.records import ImageLayout

NONE = "none"


def compressor_of(config: Any) -> CompressorSpec | None:
    """What a saved student's configuration says; None for a student without compression.

    CompatibilityError where its weights are those of another version of the compressor.
    """
    entry = getattr(config, COMPRESSED, None)
    if not entry:
        return None
    spec = CompressorSpec.from_entry(entry)
    ours = getattr(compressor_module(spec.name), "VERSION", None)
    if spec.version != ours:
        raise CompatibilityError(
            f"the student's compressor {spec.name} is of version {spec.version or 1}, this kdcli has {ours or 1}, which reads its weights "
            "differently: train the student again, or use the kdcli version that made it"
        )
    return spec


def settle(asked: CompressorSpec | None, config: Any, processor: Any, student: str) -> CompressorSpec | None:
    """What the student will have; CompatibilityError where that cannot be, before any weights are read.

    Args:
        asked: None: as the student is. student: its name, for the message.
    """
    has = compressor_of(config)
    if asked is None:  # its configuration may have been written by hand
        return has and compressor_module(has.name).settle(has, site_of(config, processor, student))
    if has is None:
        return _settle_fresh(asked, config, processor, student)
    wanted = asked.name or has.name
    if asked.optional:
        asked, wanted = replace(asked, name=has.name), has.name
    elastic = compressor_module(wanted).ELASTIC and wanted == has.name
    count = asked.vision_tokens if elastic and asked.vision_tokens is not None else has.vision_tokens
    kept = replace(has, vision_tokens=count)
    choices = {"vision_tokens": count, "layers": kept.layers, "largest": kept.largest}
    if wanted != has.name or any(getattr(asked, name) not in (None, (), value) for name, value in choices.items()):
        raise CompatibilityError(
            f"{student} already has compressor {has.name} with {has.count} vision tokens, which cannot become {wanted} with "
            f"{asked.vision_tokens or 'another setting'}: leave --compressor and --vision-tokens out, or start from a student without one"
        )
    return compressor_module(has.name).settle(kept, site_of(config, processor, student))


def _settle_fresh(asked: CompressorSpec, config: Any, processor: Any, student: str) -> CompressorSpec:
    """For a student that has none yet."""
    if not asked.name:
        raise KdcliError(
            f"{student} has no compressor, which vision_tokens {asked.vision_tokens} needs: train it with one, e.g. "
            "--compressor adaptive_pool"
        )
    module = compressor_module(asked.name)
    if asked.layers and not module.CHOOSES_LAYERS:
        raise KdcliError(
            f"compressor {asked.name} reads the student's own feature layer: leave vision_feature_layers out"
        )
    site = site_of(config, processor, student)
    if module.ELASTIC and family_of(config).packs_views:
        raise CompatibilityError(
            f"compressor {asked.name} keeps the first tokens of an image, and the tiles of {student} are packed by rows and columns: "
            "use --compressor adaptive_pool"
        )
    return replace(module.settle(asked, site), optional=False)


def asked_for(settings: TrainSettings, default: str | None = None) -> CompressorSpec | None:
    """What ``[train]`` asks of a student, or a method's ``default`` where that says nothing; None: as the student is.

    KdcliError listing the choices where there is no such compressor.
    """
    name, count, layers = settings.compressor, settings.vision_tokens, settings.vision_feature_layers
    if name == NONE:
        if count is not None or layers:
            raise KdcliError(
                f"--compressor {NONE} does not change the student: leave vision_tokens and vision_feature_layers out"
            )
        return None
    if name is None and default is None and count is None and not layers:
        return None
    spec = CompressorSpec(name or default or "", count, layers, optional=name is None)
    if spec.name:
        compressor_module(spec.name)
    return spec


def site_of(config: Any, processor: Any, student: str) -> Site:
    """CompatibilityError where the student's views are not square grids before a projector (LLaVA-1.5, LLaVA-NeXT)."""
    if not family_of(config).compressible(config):
        fitting = [name for one in families() if one.stock_class for name in one.model_types]
        raise CompatibilityError(
            f"{student} is of family {config.model_type}: compressors need a LLaVA-1.5 or LLaVA-NeXT type student (square views, "
            f"model_type {' or '.join(fitting)}): use --compressor none"
        )
    site, patches = site_of_config(config), stock_tokens(processor)
    if patches != site.side**2:
        raise CompatibilityError(
            f"{student}: its processor writes {patches} vision tokens an image, its vision tower has {site.side}×{site.side} patches; "
            "compressors need one token a patch, no class token: use --compressor none"
        )
    return site


def site_of_config(config: Any) -> Site:
    vision, layers = config.vision_config, config.vision_feature_layer
    return Site(
        side=vision.image_size // vision.patch_size,  # SigLIP of 384 pixels leaves 6 of them out: 27×27 patches of 14
        vision_width=vision.hidden_size,
        text_width=config.text_config.hidden_size,
        layers=(layers,) if isinstance(layers, int) else tuple(layers),
        depth=vision.num_hidden_layers,
    )


def stock_tokens(processor: Any) -> int:
    """Placeholders that the stock LLaVA processor writes for one view of its crop size."""
    crop = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    sides = [crop[side] // processor.patch_size for side in ("height", "width")]
    class_token = processor.vision_feature_select_strategy == "default"
    return sides[0] * sides[1] + processor.num_additional_image_tokens - class_token


def install(model: Any, spec: CompressorSpec) -> None:
    """Put a settled compressor where the projector stands; fresh weights come from torch's generator as it is."""
    projector = compressor_module(spec.name).build(
        spec, site_of_config(model.config), model.model.multi_modal_projector
    )
    model.model.multi_modal_projector = projector
    setattr(model.config, COMPRESSED, spec.entry())
    if spec.layers:
        model.config.vision_feature_layer = list(spec.layers)
    if family_of(model.config).packs_views:
        model.model.pack_image_features = packing(model, spec)


def packing(model: Any, spec: CompressorSpec) -> Any:
    """The model's own packing of tiles (no padding, a newline a row), told that a patch is as large as a compressed token."""
    coarse = copy.deepcopy(model.config)
    rows, _ = compressor_module(spec.name).grid(spec)
    coarse.vision_config.patch_size = coarse.vision_config.image_size // rows
    # A namespace, not the model itself: a copy of the model must not pack by way of its original.
    return partial(type(model.model).pack_image_features, SimpleNamespace(config=coarse))


@cache
def compressed_class(model_type: str) -> type:
    """The family's class that builds the projector its configuration names: ``from_pretrained`` then finds every weight by name.

    It has the stock class's name and module, which decide how transformers names the weights of a folder, and what the folder
    says its class is.
    """
    import transformers

    stock = getattr(transformers, family_named(model_type).stock_class)

    def build(self: Any, config: Any) -> None:
        stock.__init__(self, config)
        spec = compressor_of(config)
        assert spec is not None
        install(self, spec)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})


def load_compressed(model_id: str, spec: CompressorSpec, attn_implementation: str, **arguments: Any) -> nn.Module:
    """A saved compressed student; KdcliError where weights are missing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
    setattr(config, COMPRESSED, spec.entry())
    model, found = compressed_class(config.model_type).from_pretrained(  # type: ignore[attr-defined]
        model_id, output_loading_info=True, **arguments, **attending(config, attn_implementation)
    )
    missing = sorted(name for name in found["missing_keys"] if "multi_modal_projector" in name)
    if missing:
        raise KdcliError(f"student {model_id!r} has compressor {spec.name}, but lacks its weights {', '.join(missing)}")
    return model


def first_tokens(layout: tuple[ImageLayout, ...], count: int) -> tuple[ImageLayout, ...]:
    """Images of one view each, of which only the first ``count`` tokens are left."""
    return tuple(replace(image, views=(replace(image.views[0], grid=(1, count)),)) for image in layout)


def with_grid(processor: Any, spec: CompressorSpec | None, training: bool = False) -> Any:
    """The processor of a student with this compressor; ``training``: of the largest count that a step can draw."""
    if spec is None:
        return processor
    module = compressor_module(spec.name)
    return compress_processor(processor, module.training_grid(spec) if training else module.grid(spec))
