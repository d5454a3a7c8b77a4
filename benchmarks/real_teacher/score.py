"""What the real teacher can do on held-out scenes: nats of captions, exact answers; beside a blank picture, a wrong one, the usual answer.

python -m benchmarks.real_teacher.score --teacher runs/real_teacher [--captions 128] [--questions 50] [--save]
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional

from benchmarks.common import finish, machine, print_table
from benchmarks.demo_training.score import questions
from benchmarks.real_teacher.lessons import IGNORED, Encoder, collate
from pipelines.demo.questions import CAPTION_REQUESTS, IMAGE_FAMILIES, QuestionTurn, caption
from pipelines.demo.render import render
from pipelines.demo.scenes import IMAGE_SIZE, sample_scene

BLANK = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (230, 230, 230))
BATCH = 8


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/real_teacher"))
    parser.add_argument("--captions", type=int, default=128, help="held-out scenes")
    parser.add_argument("--questions", type=int, default=50, help="held-out questions a family")
    parser.add_argument("--examples", type=int, default=4, help="captions to write out")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/…json")
    return parser.parse_args(arguments)


class Judge:
    """The teacher's folder, asked through its own processor and forward pass."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        # In bfloat16, as it is shipped and as a capture runs it.
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        config = self.model.config
        self.encoder = Encoder(self.processor.tokenizer, config.image_token_id, config.image_seq_length)

    @torch.no_grad()
    def judge(self, asked: list[tuple[Image.Image, QuestionTurn]]) -> list[tuple[float, int, bool]]:
        """(summed nats, tokens, whether greedy decoding would say exactly this) of each answer."""
        judged = []
        for first in range(0, len(asked), BATCH):
            part = asked[first : first + BATCH]
            ids, targets = collate([self.encoder.row([turn]) for _, turn in part])
            pixels = self.processor.image_processor([one for one, _ in part], return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.model.dtype)
            states = self.model.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
            for row, wanted in zip(states, targets):
                answered = wanted != IGNORED
                logits = self.model.lm_head(row[answered]).float()
                nats = functional.cross_entropy(logits, wanted[answered], reduction="sum")
                said = bool((logits.argmax(-1) == wanted[answered]).all())
                judged.append((float(nats), int(answered.sum()), said))
        return judged

    def say(self, picture: Image.Image, request: str) -> str:
        """A greedy answer, through the chat template."""
        content = [{"type": "image"}, {"type": "text", "text": request}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=text, images=picture, return_tensors="pt").to(self.model.dtype)
        made = self.model.generate(**inputs, do_sample=False, max_new_tokens=60)
        return str(self.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def describe_states(judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """Of response and of vision rows: entropy in nats, and how far the widest dimension of the last states is from the median one."""
    rng = random.Random("real-teacher/states")
    found: dict[str, list[torch.Tensor]] = {"response": [], "vision": []}
    for _ in range(count):
        scene = sample_scene(rng, "heldout")
        ids, targets = collate([judge.encoder.row([QuestionTurn(CAPTION_REQUESTS[0], caption(scene), "caption")])])
        pixels = judge.processor.image_processor([render(scene)], return_tensors="pt")["pixel_values"]
        states = judge.model.model(input_ids=ids, pixel_values=pixels.to(judge.model.dtype)).last_hidden_state
        found["response"].append(states[targets != IGNORED])
        found["vision"].append(states[ids == judge.encoder.placeholder])
    told = {}
    for name, parts in found.items():
        states = torch.cat(parts)
        log_p = judge.model.lm_head(states).float().log_softmax(-1)
        deviations = states.float().std(0)
        told[name] = {
            "rows": len(states),
            "entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
            "widest_over_median": float(deviations.max() / deviations.median()),
        }
    return told


def score_captions(judge: Judge, count: int) -> dict[str, float]:
    """Nats a token of held-out captions, given the picture, a blank one, and another scene's."""
    rng = random.Random("real-teacher/captions")
    scenes = [sample_scene(rng, "heldout") for _ in range(count)]
    turns = [QuestionTurn(rng.choice(CAPTION_REQUESTS), caption(one), "caption") for one in scenes]
    pictures = [render(one) for one in scenes]
    shown = {"teacher": pictures, "blank_image": [BLANK] * count, "other_image": [*pictures[1:], pictures[0]]}
    told = {}
    for name, given in shown.items():
        judged = judge.judge(list(zip(given, turns)))
        told[name] = sum(one[0] for one in judged) / sum(one[1] for one in judged)
    return told


def score_questions(judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """Shares of exact answers by family: of the teacher, of the teacher with a blank picture, of the usual answer in training."""
    asked = [(scenes[0], turn) for scenes, turn in questions("heldout", count, seed=1) if scenes]
    trained = Counter((turn.family, turn.answer) for scenes, turn in questions("train", 4 * count, seed=1) if scenes)
    seen = judge.judge([(render(scene), turn) for scene, turn in asked])
    blank = judge.judge([(BLANK, turn) for _, turn in asked])
    table = {}
    for family in IMAGE_FAMILIES:
        own = [i for i, (_, turn) in enumerate(asked) if turn.family == family]
        usual = max((one for one in trained if one[0] == family), key=lambda one: trained[one])[1]
        table[family] = {
            "teacher": sum(seen[i][2] for i in own) / len(own),
            "blank_image": sum(blank[i][2] for i in own) / len(own),
            "majority": sum(asked[i][1].answer == usual for i in own) / len(own),
            "questions": len(own),
        }
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    judge = Judge(options.teacher)
    states = describe_states(judge, max(1, options.captions // 4))
    captions, table = score_captions(judge, options.captions), score_questions(judge, options.questions)
    rng = random.Random("real-teacher/examples")
    examples = []
    for _ in range(options.examples):
        scene = sample_scene(rng, "heldout")
        examples.append({"shown": caption(scene), "said": judge.say(render(scene), CAPTION_REQUESTS[0])})
    print_table(["nats of a caption's token", *captions], [["", *(f"{one:.3f}" for one in captions.values())]])
    columns = ("teacher", "blank_image", "majority")
    print_table(["exact", *columns], [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in table.items()])
    settings = {"captions": options.captions, "questions": options.questions}
    body = {"machine": machine("cpu"), "shapes": "dinov2-s-smollm2-135m", "settings": settings}
    finish(
        "real_teacher",
        {**body, "states": states, "captions": captions, "questions": table, "examples": examples},
        options.save,
    )


if __name__ == "__main__":
    main()
