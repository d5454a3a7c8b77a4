"""What do the bounds of chat templates cost? Of rendering alone, and of preparing a row, with them and without.

    python -m benchmarks.rendering [--rows 200] [--repeats 9]

Templates: the model's own (``--models``, or ``--model FOLDER``), and two that are written here, ``parts`` as most models have it and
``macros``, which calls a macro, filters and string methods for every part. A row is a question about an image and three further turns.
*Preparing* is ``Preparer.prepare`` of such a row with the model's own template: picture, template, tokens, labels. Ratios are medians of
those inside a repeat.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish, machine, median_ratio, print_table, spread
from teacher_cache.preparing.bounded_templates import bounded, install
from teacher_cache.preparing.prepare import Preparer
from teacher_cache.records import Image, Sample, Turn
from teacher_cache.teachers.transformers import TeacherSpec, load_processor

TALK = (
    Turn(
        "user", "<image>\nWhat is to be seen in the lower left corner of this picture, and how many of them are there?"
    ),
    Turn("assistant", "Three small red boats, one of them with a sail, lie at the quay in front of a white house."),
    Turn("user", "Is anybody on board?"),
    Turn("assistant", "Nobody can be seen on any of the three boats.\n\nTwo people stand on the quay."),
)
PARTS = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}
{{- message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"""
MACROS = """{%- macro show(part, last) -%}{% if part.type == 'image' %}<image>{% else %}{{ part.text | trim | replace('\n\n', '\n') }}
{%- if last %}{{ part.text.split('</think>')[-1].lstrip('\n')[:0] }}{% endif %}{% endif %}{%- endmacro -%}
{%- set ns = namespace(images=0) -%}{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for m in rest -%}{{ '<|' ~ m.role | upper ~ '|>' }}{%- for part in m.content -%}
{%- if part.type == 'image' -%}{%- set ns.images = ns.images + 1 -%}{%- endif -%}{{ show(part, loop.last) }}{%- endfor -%}
{{ '\n' * 2 }}{%- endfor -%}{{ ns.images | string }}"""


@contextmanager
def unbounded() -> Iterator[None]:
    """In here transformers renders with jinja's own environment."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils as used

    install()
    with_bounds = used.ImmutableSandboxedEnvironment  # type: ignore[attr-defined, misc]
    used.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment  # type: ignore[attr-defined, misc]
    used._compile_jinja_template.cache_clear()
    try:
        yield
    finally:
        used.ImmutableSandboxedEnvironment = with_bounds  # type: ignore[attr-defined, misc]
        used._compile_jinja_template.cache_clear()


def microseconds(work: Callable[[], Any], rows: int) -> float:
    """Of this thread's processor time, a row; once before the clock runs, which compiles the template."""
    work()
    started = time.thread_time()
    for _ in range(rows):
        work()
    return (time.thread_time() - started) / rows * 1e6


def works(folder: str) -> dict[str, Callable[[], Any]]:
    """By name, what is timed."""
    import PIL.Image

    processor, config = load_processor(TeacherSpec(folder))
    preparer = Preparer(processor, config)
    picture = io.BytesIO()
    PIL.Image.new("RGB", (160, 120), (90, 120, 30)).save(picture, "PNG")
    sample = Sample("sft", 0, "", "row 0", TALK, (Image("a.png", picture.getvalue()),))
    messages = preparer.chat.messages(TALK)

    def rendering(template: str) -> Callable[[], Any]:
        def work() -> str:
            with bounded():
                return processor.apply_chat_template(messages, chat_template=template, tokenize=False)

        return work

    templates = {"own": processor.chat_template, "parts": PARTS, "macros": MACROS}
    return {
        **{f"rendering, {name}": rendering(text) for name, text in templates.items()},
        "preparing, own": lambda: preparer.prepare(sample, "chat"),
    }


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    timed = works(str(options.model or Path(options.models) / "teacher"))
    plain: dict[str, list[float]] = {name: [] for name in timed}
    counted: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.repeats):
        for name, work in timed.items():
            with unbounded():
                plain[name].append(microseconds(work, options.rows))
            counted[name].append(microseconds(work, options.rows))
    results = [
        {
            "what": name,
            "microseconds_without": spread(plain[name]),
            "microseconds_with": spread(counted[name]),
            "ratio": round(median_ratio(counted[name], plain[name]), 4),
        }
        for name in timed
    ]
    rows = [
        [
            name,
            *(f"{spread(one[name])[1]:.0f}" for one in (plain, counted)),
            f"{median_ratio(counted[name], plain[name]):.3f}",
        ]
        for name in timed
    ]
    print_table(["what", "µs a row without", "with", "ratio"], rows)
    finish(
        "rendering", {"machine": machine(options.device), "shapes": options.shapes, "results": results}, options.save
    )


if __name__ == "__main__":
    main()
