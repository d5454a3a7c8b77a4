"""The model card (README.md) of an exported student: what it is, how to load it, where it comes from, what it scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pipelines.export.provenance import Provenance
from pipelines.terminal.tables import score_table
from student_train.compressors import CompressorSpec
from teacher_cache.errors import KdcliError, one_line
from teacher_cache.preparing.templates import find_template
from teacher_cache.records import Turn
from teacher_cache.sources.usable_samples import PLACEHOLDER

LICENSE_NOTE = (
    "> **License: not stated.** It is yours to choose, within those of the base student, its vision tower, the teacher and the training "
    "data. Add `license:` to the block on top of this file before you publish the folder."
)


TEXT_INPUTS = """messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")"""
CHAT_INPUTS = """picture = Image.open("picture.jpg")
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")"""


def model_card(
    origin: Provenance,
    spec: CompressorSpec | None,
    dtype: str,
    name: str,
    family: str,
    template: str | None = None,
    images: bool = True,
) -> str:
    """Markdown with the YAML block that a model hub reads.

    Args:
        template: in which the student was asked while it trained; None: nobody knows, so its chat template. images: it reads images.
    """
    try:
        trained, scored = training(origin), results(origin)
        above = summary(origin, spec, dtype, images)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise KdcliError(
            f"{origin.model}: run.json, done.json or the scores beside it are not as kdcli wrote them ({type(error).__name__}: {error}): "
            "restore them, or copy the model folder elsewhere and export that"
        ) from None
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if images else 'text-generation'}",
        "tags:",
        f"- {family if WORD.fullmatch(family) else json.dumps(family)}",
        "- distillation",
    ]
    sections = [
        "\n".join([*front, "---"]),
        f"# {safe(name)}",
        above,
        LICENSE_NOTE,
        f"## Loading\n\n{loading(spec, name, template or 'chat') if images else loading_text(name, template or 'chat')}",
        f"## Training\n\n{trained}",
        f"## Results\n\n{scored}",
    ]
    return "\n\n".join(sections) + "\n"


def summary(origin: Provenance, spec: CompressorSpec | None, dtype: str, images: bool) -> str:
    base = f", trained from {code(place(origin.stages[0]['settings']['student']))}" if origin.stages else ""
    text = f"A {'vision-language' if images else 'language model'} student{base}, exported by kdcli. Weights: {dtype}, safetensors."
    if spec:
        text += f" Vision tokens: {spec.count} an image, by the compressor {code(spec.name)}; the classes that load it are in this folder."
    return text


def loading(spec: CompressorSpec | None, name: str, template: str) -> str:
    trust = ", trust_remote_code=True" if spec else ""
    note = "\n\n`trust_remote_code=True` runs the two Python files of this folder: read them first." if spec else ""
    prompt = find_template(template).prompt
    if prompt is None:
        asked = CHAT_INPUTS
    else:
        text = json.dumps(prompt([Turn("user", f"{PLACEHOLDER}\nWhat is in the picture?")]))
        asked = f"""text = {text}  # it was trained so, not with the chat template of this folder
inputs = processor(images=[Image.open("picture.jpg")], text=[text], return_tensors="pt")"""
    folder = literal(name)
    return f"""```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({folder}{trust})
processor = AutoProcessor.from_pretrained({folder}{trust})
{asked}
said = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.batch_decode(said[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```{note}"""


def literal(name: str) -> str:
    """A name inside a block of Python: as JSON it has neither line breaks nor what else would end the block."""
    return json.dumps(one_line(name)).replace("`", "\\u0060")


def loading_text(name: str, template: str) -> str:
    """The same for a student that reads text alone."""
    prompt = find_template(template).prompt
    asked = TEXT_INPUTS
    if prompt is not None:
        text = json.dumps(prompt([Turn("user", "What is the capital of France?")]))
        asked = f"""text = {text}  # it was trained so, not with the chat template of this folder
inputs = tokenizer([text], return_tensors="pt")"""
    folder = literal(name)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
{asked}
said = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```"""


def training(origin: Provenance) -> str:
    """Stages, cache, teacher, versions."""
    if origin.card is None:
        return "There is no run beside the exported folder (`run.json`), so its training is unknown."
    versions = ", ".join(safe(f"{name} {version}") for name, version in origin.card.get("versions", {}).items())
    lines = [
        *stage_lines(origin),
        f"- **Cache**: {code(place(origin.card['cache']))}, plan {code(origin.card['plan_hash'])}{rows_of(origin)}",
        *teacher_lines(origin),
        f"- **Versions**: {versions or 'not recorded'}; kdcli commit {code(origin.card.get('git'))}",
    ]
    return "\n".join(lines)


def stage_lines(origin: Provenance) -> list[str]:
    lines = [f"- **Base student**: {code(place(origin.stages[0]['settings']['student']))}"]
    for one in origin.stages:
        settings, done = one["settings"], one["result"]
        fields = sorted({field for served in one.get("fields", {}).values() for field in served})
        lines.append(
            f"- **Stage {safe(one['stage'])}**: method {code(one['method'])}{knobs(one.get('knobs', {}))}; "
            f"{safe(done.get('steps', 'unknown'))} steps, {safe(done.get('samples', 'unknown'))} samples of "
            f"{safe(', '.join(one['parts']))}; "
            f"learning rate {float(settings['learning_rate']):g}, seed {safe(settings['seed'])}, "
            f"{'bf16' if settings['bf16'] else 'float32'}; fields read: {safe(', '.join(fields) or 'none')}"
        )
    return lines


def knobs(values: Mapping[str, Any]) -> str:
    return f" ({', '.join(safe(f'{name}={value}') for name, value in values.items())})" if values else ""


def rows_of(origin: Provenance) -> str:
    if origin.cache is None:
        return " (not reachable when this was exported)"
    return ", rows " + ", ".join(safe(f"{part} {rows}") for part, rows in origin.cache["rows"].items())


def teacher_lines(origin: Provenance) -> list[str]:
    """One line a teacher: the fields that were read may be several teachers'."""
    if origin.cache is None:
        return []
    read = {field for one in origin.stages for served in one.get("fields", {}).values() for field in served}
    teachers: dict[str, list[str]] = {}
    for name in sorted(read & origin.cache["fields"].keys()):
        one = origin.cache["fields"][name]["teacher"]
        said = (
            f"{safe(one.get('architecture', 'unknown architecture'))}, weights {code(one.get('weights'))}, tokenizer "
            f"{code(one.get('tokenizer', {}).get('sha256'))}, {safe(one.get('dtype', 'unknown dtype'))}, "
            f"{safe(one.get('backend', 'unknown backend'))}"
        )
        teachers.setdefault(said, []).append(name)
    if not teachers:
        return ["- **Teacher**: none, no field of the cache was read"]
    return [f"- **Teacher** of {safe(', '.join(names))}: {said}" for said, names in teachers.items()]


def results(origin: Provenance) -> str:
    if not origin.scores:
        return "None with the run: `kdcli eval MODEL --data FILE --out RUN/scores.json` writes scores for this section."
    short = ["/".join(PurePath(name).parts[-2:]) if is_private(name) else name for name in origin.scores]
    names = [f"{name} ({i})" if short.count(name) > 1 else name for i, name in enumerate(short, start=1)]
    return score_table(dict(zip(map(in_table, names), map(_in_tables, origin.scores.values()))))


WORD = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
PLAIN = re.compile(r"[\w .,;:=+/()@%–-]*")
"""Of what means nothing to Markdown where it stands within a line."""


def code(text: Any) -> str:
    """As a code span that no text ends; "unknown" for none."""
    if not text:
        return "unknown"
    said = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", said)), default=0))
    return f"{ticks} {said} {ticks}" if "`" in said else f"`{said}`"


def safe(text: Any) -> str:
    """A text in a line of the card: as it is where that is harmless, else as code, so that it is neither markup, nor a link or a tag."""
    said = one_line(text)
    return said if PLAIN.fullmatch(said) and "://" not in said else code(said)


def in_table(text: Any) -> str:
    """The same in a table, whose cells a bar would end."""
    return safe(text).replace("|", "\\|")


def _in_tables(one: Any) -> Any:
    """A model's results, the names and texts in them fit for a table."""
    if isinstance(one, Mapping):
        return {in_table(key): _in_tables(value) for key, value in one.items()}
    if isinstance(one, list):
        return [_in_tables(value) for value in one]
    return in_table(one) if isinstance(one, str) else one


def place(path: str) -> str:
    """A hub id, an address, or a relative path as it is; of an absolute path its last part, which is all that others should learn."""
    said = one_line(path)
    return PurePath(said).name if is_private(said) else said


def is_private(path: str) -> bool:
    """Whether it says how somebody's folders are laid out."""
    return path.startswith(("/", "~"))
