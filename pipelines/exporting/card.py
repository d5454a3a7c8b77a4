"""The model card (README.md) of an exported student: what it is, how to load it, where it comes from, what it scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pipelines.exporting.provenance import Provenance
from pipelines.tables import score_table
from student_train.compressors import CompressorSpec
from teacher_cache.model_kind import reads_images
from teacher_cache.records import Turn
from teacher_cache.rows import PLACEHOLDER
from teacher_cache.templates import find_template

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
    origin: Provenance, spec: CompressorSpec | None, dtype: str, name: str, config: Any, template: str | None = None
) -> str:
    """Markdown with the YAML block that a model hub reads.

    Args:
        config: the student's. template: in which the student was asked while it trained; None: nobody knows, so its chat template.
    """
    images = reads_images(config)
    front = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if images else 'text-generation'}",
        "tags:",
        f"- {config.model_type}",
        "- distillation",
    ]
    sections = [
        "\n".join([*front, "---"]),
        f"# {name}",
        summary(origin, spec, dtype, images),
        LICENSE_NOTE,
        f"## Loading\n\n{loading(spec, name, template or 'chat') if images else loading_text(name, template or 'chat')}",
        f"## Training\n\n{training(origin)}",
        f"## Results\n\n{results(origin)}",
    ]
    return "\n\n".join(sections) + "\n"


def summary(origin: Provenance, spec: CompressorSpec | None, dtype: str, images: bool) -> str:
    base = f", trained from `{place(origin.stages[0]['settings']['student'])}`" if origin.stages else ""
    text = f"A {'vision-language' if images else 'language model'} student{base}, exported by kdcli. Weights: {dtype}, safetensors."
    if spec:
        text += f" Vision tokens: {spec.count} an image, by the compressor `{spec.name}`; the classes that load it are in this folder."
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
    return f"""```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{trust})
processor = AutoProcessor.from_pretrained("{name}"{trust})
{asked}
said = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.batch_decode(said[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```{note}"""


def loading_text(name: str, template: str) -> str:
    """The same for a student that reads text alone."""
    prompt = find_template(template).prompt
    asked = TEXT_INPUTS
    if prompt is not None:
        text = json.dumps(prompt([Turn("user", "What is the capital of France?")]))
        asked = f"""text = {text}  # it was trained so, not with the chat template of this folder
inputs = tokenizer([text], return_tensors="pt")"""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
{asked}
said = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])
```"""


def training(origin: Provenance) -> str:
    """Stages, cache, teacher, versions."""
    if origin.card is None:
        return "No run stands beside the exported folder (`run.json`), so nothing is known of its training."
    versions = ", ".join(f"{name} {version}" for name, version in origin.card.get("versions", {}).items())
    lines = [
        *stage_lines(origin),
        f"- **Cache**: `{place(origin.card['cache'])}`, plan `{origin.card['plan_hash']}`{rows_of(origin)}",
        *teacher_lines(origin),
        f"- **Versions**: {versions or 'not recorded'}; kdcli commit {code(origin.card.get('git'))}",
    ]
    return "\n".join(lines)


def stage_lines(origin: Provenance) -> list[str]:
    lines = [f"- **Base student**: `{place(origin.stages[0]['settings']['student'])}`"]
    for one in origin.stages:
        settings, done = one["settings"], one["result"]
        fields = sorted({field for served in one.get("fields", {}).values() for field in served})
        lines.append(
            f"- **Stage {one['stage']}**: method `{one['method']}`{knobs(one.get('knobs', {}))}; "
            f"{done.get('steps', 'unknown')} steps, {done.get('samples', 'unknown')} samples of {', '.join(one['parts'])}; "
            f"learning rate {settings['learning_rate']:g}, seed {settings['seed']}, {'bf16' if settings['bf16'] else 'float32'}; "
            f"fields read: {', '.join(fields) or 'none'}"
        )
    return lines


def knobs(values: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{name}={value}' for name, value in values.items())})" if values else ""


def rows_of(origin: Provenance) -> str:
    if origin.cache is None:
        return " (not reachable when this was exported)"
    return ", rows " + ", ".join(f"{part} {rows}" for part, rows in origin.cache["rows"].items())


def teacher_lines(origin: Provenance) -> list[str]:
    """One line a teacher: the fields that were read may be several teachers'."""
    if origin.cache is None:
        return []
    read = {field for one in origin.stages for served in one.get("fields", {}).values() for field in served}
    teachers: dict[str, list[str]] = {}
    for name in sorted(read & origin.cache["fields"].keys()):
        one = origin.cache["fields"][name]["teacher"]
        said = (
            f"{one.get('architecture', 'unknown architecture')}, weights {code(one.get('weights'))}, tokenizer "
            f"{code(one.get('tokenizer', {}).get('sha256'))}, {one.get('dtype', 'unknown dtype')}, {one.get('backend', 'unknown backend')}"
        )
        teachers.setdefault(said, []).append(name)
    if not teachers:
        return ["- **Teacher**: none, no field of the cache was read"]
    return [f"- **Teacher** of {', '.join(names)}: {said}" for said, names in teachers.items()]


def results(origin: Provenance) -> str:
    if not origin.scores:
        return "None with the run: `kdcli eval MODEL --data FILE --out RUN/scores.json` writes what is shown here."
    short = ["/".join(PurePath(name).parts[-2:]) if is_private(name) else name for name in origin.scores]
    names = [f"{name} ({i})" if short.count(name) > 1 else name for i, name in enumerate(short, start=1)]
    return score_table(dict(zip(names, origin.scores.values())))


def code(text: str | None) -> str:
    return f"`{text}`" if text else "unknown"


def place(path: str) -> str:
    """A hub id, an address, or a relative path as it is; of an absolute path its last part, which is all that others should learn."""
    return PurePath(path).name if is_private(path) else path


def is_private(path: str) -> bool:
    """Whether it says how somebody's folders are laid out."""
    return path.startswith(("/", "~"))
