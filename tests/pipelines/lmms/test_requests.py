"""What the plug-in understands of lmms-eval, without lmms-eval."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from pipelines.lmms.requests import UNLIKELY, generation, lost_note, model_arguments, prompt, row
from student_train.pruning import Pruning
from teacher_cache.errors import CompatibilityError, KdcliError
from teacher_cache.sources.usable_samples import decode_image


def picture(colour: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.effect_noise((20, 16), 50 + colour).convert(mode)


def test_arguments_as_lmms_eval_hands_them_on() -> None:
    given = {"pretrained": 2025, "compress": "dart", "keep": 64, "batch_size": "8", "device": None, "dtype": "bfloat16"}
    arguments = model_arguments(given)
    assert (arguments.pretrained, arguments.batch_size, arguments.device) == ("2025", 8, None)
    assert arguments.pruning == Pruning("dart", 2, keep=64)
    assert arguments.torch_dtype("cpu") == torch.bfloat16
    plain = model_arguments({"pretrained": "student"})
    assert plain.pruning is None and plain.batch_size == 1
    assert (plain.torch_dtype("cpu"), plain.torch_dtype("cuda:1")) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--model_args: pretrained is missing"),
        ({"pretrained": "x", "keeps": 4}, "--model_args: unknown key keeps; known are"),
        ({"pretrained": "x", "keep": 4}, "--model_args: keep and compress-layer need compress"),
        ({"pretrained": "x", "compress": "dart", "keep": "many"}, "--model_args: keep must be"),
        ({"pretrained": "x", "dtype": "fp8"}, "dtype must be auto, float32, bfloat16, float16, got 'fp8'"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size must be a whole number for model kdcli, got 'auto'"),
        ({"pretrained": "x", "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_arguments_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(KdcliError, match=message):
        model_arguments(given)


def test_ways_to_generate() -> None:
    usual = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": "\n"}
    way = generation(usual, "gqa")
    assert (way.max_new_tokens, way.stop) == (16, ("\n",))
    assert generation({}, "gqa").max_new_tokens == 1024 and generation({"until": ["a", ""]}, "gqa").stop == ("a",)
    assert generation({"temperature": 0.7, "do_sample": False}, "gqa").stop == ()
    for other in ({"temperature": 0.2}, {"do_sample": True}, {"num_beams": 3}):
        with pytest.raises(KdcliError, match="task gqa samples or searches beams and model kdcli answers greedily"):
            generation(other, "gqa")


@pytest.mark.parametrize(
    ("context", "count", "text"),
    [
        ("what is it", 1, "<image>\nwhat is it"),
        ("which", 2, "<image>\n<image>\nwhich"),
        ("how many", 0, "how many"),
        ("is <image> or <image> larger", 2, "is <image> or <image> larger"),
        ("see <image>, then <image> again", 1, "<image>\nsee , then  again"),
        ("say <image>", 0, "say "),
    ],
)
def test_images_stand_where_the_text_has_them_or_in_front(context: str, count: int, text: str) -> None:
    made = prompt(context, [picture(number) for number in range(count)], "any")
    assert [turn.text for turn in made.turns] == [text] and len(made.images) == count


def test_requests_without_images_and_with_other_things() -> None:
    assert prompt("how many", None, "text").images == []
    assert prompt("what", [picture(0, "RGBA")], "any").images[0].mode == "RGB"
    with pytest.raises(CompatibilityError, match="task mvbench shows a str; model kdcli reads pictures only"):
        prompt("what", ["film.mp4"], "mvbench")


def test_a_continuation_becomes_a_row_of_the_same_pixels() -> None:
    asked = prompt("what is it", [picture(3)], "any")
    made = row(asked, " a circle")
    assert [turn.role for turn in made.turns] == ["user", "assistant"] and made.turns[1].text == "a circle"
    assert decode_image(made.images[0], 1000).tobytes() == asked.images[0].tobytes()


def test_the_package_is_importable_without_lmms_eval() -> None:
    """The entry point is imported by lmms-eval alone, and cheaply: neither lmms-eval nor torch comes with it."""
    program = "import sys, pipelines.lmms; print(sorted({'torch', 'lmms_eval', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_continuations_that_cannot_be_rendered_are_counted() -> None:
    lost = [("mmmu", "reserved_token"), ("gqa", "image_corrupt"), ("mmmu", "reserved_token")]
    assert lost_note(lost, 40, UNLIKELY) == (
        "kdcli: 3 of 40 continuations cannot be rendered and count as infinitely unlikely: "
        "2 reserved_token in mmmu, 1 image_corrupt in gqa"
    )
