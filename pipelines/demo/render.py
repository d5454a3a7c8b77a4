"""Scene -> 96 x 96 RGB picture (Pillow only; the font is the one bundled with Pillow)."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.demo.scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, Scene, Shape

SLOT = 24  # pixels: width of a bar column and of a character slot
CELL = IMAGE_SIZE // 3  # pixels: side of one cell of the 3 x 3 layout
VALUE_STEP = 8  # pixels of bar height per unit of value


def render(scene: Scene) -> Image.Image:
    """The picture; equal scenes give equal pixels."""
    tint = random.Random(scene.tint_seed)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _tinted(BACKGROUNDS[scene.background], tint, 4))
    draw = ImageDraw.Draw(image)
    if scene.kind == "shapes":
        for shape in scene.shapes:
            _draw_shape(draw, shape, _tinted(COLORS[shape.color], tint, 12))
    elif scene.kind == "chart":
        _draw_chart(draw, scene, tint)
    else:
        ink = _tinted(COLORS[scene.ink], tint, 12)
        for i, character in enumerate(scene.text):
            _draw_character(draw, character, scene.x + SLOT * i + SLOT // 2, scene.y + SLOT // 2, 28, ink)
    return image


def pixels_u8(scene: Scene) -> np.ndarray:
    """``uint8 [96, 96, 3]``"""
    return np.asarray(render(scene))


def shape_box(shape: Shape) -> tuple[int, int, int, int]:
    """Pixel box ``(x0, y0, x1, y1)`` that a shape fills."""
    x = shape.cell % 3 * CELL + CELL // 2 + shape.dx
    y = shape.cell // 3 * CELL + CELL // 2 + shape.dy
    return x - shape.radius, y - shape.radius, x + shape.radius, y + shape.radius


def bar_box(slot: int, value: int) -> tuple[int, int, int, int]:
    """Pixel box of one bar; its value is written in the 16 pixels above it."""
    return slot * SLOT + 3, IMAGE_SIZE - value * VALUE_STEP, slot * SLOT + SLOT - 4, IMAGE_SIZE - 1


def _draw_chart(draw: ImageDraw.ImageDraw, scene: Scene, tint: random.Random) -> None:
    for bar in scene.bars:
        box = bar_box(bar.slot, bar.value)
        draw.rectangle(box, fill=_tinted(COLORS[bar.color], tint, 12))
        _draw_character(draw, str(bar.value), bar.slot * SLOT + SLOT // 2, box[1] - 8, 20, (20, 20, 20))
    draw.line((0, IMAGE_SIZE - 1, IMAGE_SIZE, IMAGE_SIZE - 1), fill=(20, 20, 20))


def _draw_character(draw: ImageDraw.ImageDraw, character: str, x: int, y: int, size: int, ink: tuple) -> None:
    draw.text((x, y), character, font=_font(size), fill=ink, anchor="mm")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _tinted(color: tuple[int, int, int], tint: random.Random, amount: int) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + tint.randint(-amount, amount))) for c in color)
    return r, g, b


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fill: tuple) -> None:
    x0, y0, x1, y1 = shape_box(shape)
    x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, shape.radius
    if shape.shape == "circle":
        draw.ellipse((x0, y0, x1, y1), fill=fill)
    elif shape.shape == "square":
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), fill=fill)
    elif shape.shape == "triangle":
        draw.polygon([(x, y0), (x1, y1), (x0, y1)], fill=fill)
    elif shape.shape == "star":
        points = []
        for i in range(10):
            length = (r + 1) if i % 2 == 0 else r * 0.42
            angle = math.pi * i / 5 - math.pi / 2
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        draw.polygon(points, fill=fill)
    else:  # cross
        w = r // 3 + 1
        draw.rectangle((x - w, y0, x + w, y1), fill=fill)
        draw.rectangle((x0, y - w, x1, y + w), fill=fill)
