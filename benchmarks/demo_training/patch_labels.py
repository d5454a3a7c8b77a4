"""What is inside each of the 12 x 12 patches of a scene: the words and attributes that the tower is taught.

``patch_words`` is also what the teacher's own vision tokens are asked to say through the LM head, so that their
distributions mean something to a reader (and are worth distilling).
"""

from __future__ import annotations

import numpy as np

from pipelines.demo.render import CELL, SLOT, bar_box, shape_box
from pipelines.demo.scenes import CELLS, COLORS, GRID, PATCH, SHAPES, Scene

BACKGROUND_WORD = "background"
PATCH_WORDS = (
    BACKGROUND_WORD, *COLORS, *SHAPES, "bar", *"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "tallest", "shortest", "top", "bottom", "left", "right", "center",
    # With the space before them, as questions ("the third letter") and answers ("top left") hold them.
    " left", " right", " first", " second", " third", " fourth",
)  # fmt: skip
WORD_INDEX = {word: i for i, word in enumerate(PATCH_WORDS)}

# Throw-away attribute heads: name -> number of classes. -1 marks a patch where the attribute does not apply.
ATTRIBUTES = {
    "place": 9,  # cell of the 3 x 3 layout, bar slot, or ordinal of the character
    "total": 5,  # shapes, bars or characters in the picture
    "same_shape": 5,  # shapes of this shape in the picture
    "same_color": 5,  # shapes of this colour in the picture
    "value": 10,  # value of the bar under or above this patch
    "color": len(COLORS),  # colour of the object, also on the digits above a bar
}
MAX_WORDS = 5
_ORDINAL_WORDS = PATCH_WORDS[-4:]


def patch_words(scene: Scene) -> np.ndarray:
    """``int16 [144, 5]`` indices into ``PATCH_WORDS``, -1 for unused: the equally right words of each patch."""
    words = np.full((GRID, GRID, MAX_WORDS), -1, np.int16)
    words[..., 0] = WORD_INDEX[BACKGROUND_WORD]
    for rows, columns, names, _ in _objects(scene):
        ids = [WORD_INDEX[name] for name in names]
        words[rows, columns] = np.array(ids + [-1] * (MAX_WORDS - len(ids)), np.int16)
    return words.reshape(GRID * GRID, MAX_WORDS)


def patch_attributes(scene: Scene) -> np.ndarray:
    """``int8 [144, len(ATTRIBUTES)]`` classes, -1 where the attribute does not apply."""
    labels = np.full((GRID, GRID, len(ATTRIBUTES)), -1, np.int8)
    names = list(ATTRIBUTES)
    labels[..., names.index("total")] = len(scene.shapes) or len(scene.bars) or len(scene.text)
    for rows, columns, _, attributes in _objects(scene):
        for name, value in attributes.items():
            labels[rows, columns, names.index(name)] = value
    return labels.reshape(GRID * GRID, len(ATTRIBUTES))


def _objects(scene: Scene):
    """Yields ``(row slice, column slice, words, attributes)`` of everything drawn, in patch units."""
    colors = list(COLORS)
    if scene.kind == "shapes":
        for s in scene.shapes:
            yield (
                *_patches(shape_box(s), 3),
                (s.color, s.shape, *_cell_words(s.cell)),
                {
                    "place": s.cell,
                    "color": colors.index(s.color),
                    "same_shape": sum(o.shape == s.shape for o in scene.shapes),
                    "same_color": sum(o.color == s.color for o in scene.shapes),
                },
            )
    elif scene.kind == "chart":
        values = [b.value for b in scene.bars]
        for ordinal, b in zip(_ORDINAL_WORDS, scene.bars):
            x0, y0, x1, y1 = bar_box(b.slot, b.value)
            rank = {max(values): ("tallest",), min(values): ("shortest",)}.get(b.value, ())
            attributes = {"place": b.slot, "color": colors.index(b.color), "value": b.value}
            yield *_patches((x0, y0, x1, y1), 3), (b.color, "bar", ordinal, *rank), attributes
            yield *_patches((x0, y0 - 16, x1, y0 - 1), 3), (str(b.value), b.color, ordinal), attributes
    else:
        for i, character in enumerate(scene.text):
            x = scene.x + SLOT * i
            attributes = {"place": i, "color": colors.index(scene.ink)}
            yield (
                *_patches((x, scene.y, x + SLOT - 1, scene.y + SLOT - 1), 0),
                (character, scene.ink, _ORDINAL_WORDS[i]),
                attributes,
            )


def _cell_words(cell: int) -> list[str]:
    """``["top", " left"]``: the words of "Where is ...?", as the answer's tokens."""
    first, *rest = CELLS[cell].split()
    return [first, *(" " + word for word in rest)]


def _patches(box: tuple[int, int, int, int], slack: int) -> tuple[slice, slice]:
    """Patches that a pixel box covers by more than ``slack`` pixels."""
    x0, y0, x1, y1 = box
    rows = slice(max(0, (y0 + slack) // PATCH), (y1 - slack) // PATCH + 1)
    return rows, slice(max(0, (x0 + slack) // PATCH), (x1 - slack) // PATCH + 1)


assert CELL % PATCH == 0  # cells start on patch borders, so labels do not straddle them
