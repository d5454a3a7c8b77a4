"""Trains the projector between frozen ends: words of patches first, then answers through the language model.

    python -m benchmarks.real_teacher --untrained --out runs/real_ends
    python -m benchmarks.real_teacher.train --teacher runs/real_ends --work runs/real_teacher_training [--minutes 60]

A run that is stopped goes on where it was, with the same command. The projector is in ``projector.safetensors`` of the work folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.real_teacher.compose import save_projector
from benchmarks.real_teacher.features import kept_features
from benchmarks.real_teacher.lessons import IGNORED, Encoder, collate, draw_turns, patch_targets, word_targets

WARM_UP = 0.03  # share of a phase
WORD_RATE, WORD_SCENES = 2e-3, 32  # of the first phase: learning rate, scenes a step
FREE_TO_CHANGE = {"work", "teacher", "threads", "save_seconds", "minutes", "steps"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/real_ends"), help="a folder whose ends are taken")
    parser.add_argument("--work", type=Path, default=Path("runs/real_teacher_training"), help="features and checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="of the second phase; the learning rate ends with it"
    )
    parser.add_argument("--steps", type=int, default=None, help="plan by steps instead: the same run on any machine")
    parser.add_argument("--word-steps", type=int, default=300, help="of the first phase")
    parser.add_argument("--scenes", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="a step")
    parser.add_argument("--parts", type=int, default=2, help="a step's rows are split into; one thread computes a part")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the second phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save-seconds", type=float, default=180.0, help="a checkpoint and a line so often")
    return parser.parse_args(arguments)


@dataclass
class Progress:
    """How far a run is; ``seconds`` are of the second phase alone, ``history`` is [step, minutes, nats an answer's token]."""

    words: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[list[float]] | None = None


class Trainer:
    """One run: all that decides its future is in its options and its checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        # Many small products: a thread for each part of a step is twice as fast as all threads for each product.
        torch.set_num_threads(1)
        self.options = options
        self.model = AutoModelForImageTextToText.from_pretrained(options.teacher, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.tokenizer = AutoProcessor.from_pretrained(options.teacher).tokenizer
        self.scenes, self.features = kept_features(
            self.model, options.work, options.scenes, options.seed, options.threads
        )
        self.side = round(self.features.shape[1] ** 0.5)
        config = self.model.config
        self.encoder = Encoder(self.tokenizer, config.image_token_id, self.features.shape[1])
        self.words = word_targets(self.model.get_input_embeddings().weight, self.tokenizer)
        self.projector = fresh_projector(self.model, self.features, options.seed)
        self.model.model.language_model.bfloat16()
        self.model.lm_head.bfloat16()
        # A fifth faster than sdpa on short rows of a CPU.
        self.model.model.language_model.set_attn_implementation("eager")
        self.optimizer = torch.optim.AdamW(self.projector.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.progress = Progress(history=[])
        self._load()

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.options).items() if name not in FREE_TO_CHANGE}

    @property
    def done(self) -> float:
        """Share of the second phase, 0 to 1."""
        if self.options.steps is not None:
            return self.progress.step / max(1, self.options.steps)
        return self.progress.seconds / (60 * self.options.minutes)

    def _load(self) -> None:
        path = self.options.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{path} is of a run with {state['settings']}, not {self.settings}: take another --work")
        self.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """The checkpoint and the projector, each replaced whole."""
        draft = self.options.work / "state.draft.pt"
        state = {"projector": self.projector.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "progress": asdict(self.progress), "settings": self.settings}, draft)
        draft.replace(self.options.work / "state.pt")
        save_projector(self.model, self.options.work / "projector.safetensors")

    def update(self, rate: float) -> None:
        """One step of AdamW."""
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def word_step(self, index: int) -> float:
        """Every projected patch comes near the words of what it shows: weighted mean squared error, per dimension."""
        rng = random.Random(f"words/{self.options.seed}/{index}")
        chosen = rng.sample(range(len(self.scenes)), min(WORD_SCENES, len(self.scenes)))
        wanted = [patch_targets(self.scenes[i], self.words, self.side) for i in chosen]
        targets, weights = (torch.stack(part) for part in zip(*wanted))
        squares = (self.projector(self.features[chosen].float()) - targets).pow(2).mean(-1)
        loss = (squares * weights).sum() / weights.sum()
        loss.backward()
        self.update(WORD_RATE * schedule(index / self.options.word_steps))
        return loss.item()

    def answer_step(self, index: int) -> tuple[float, int]:
        """(summed nats, answer tokens) of one step's rows; the same whatever the number of threads."""
        rng = random.Random(f"answers/{self.options.seed}/{index}")
        drawn = []
        for i in rng.sample(range(len(self.scenes)), self.options.rows):
            drawn.append((i, self.encoder.row(draw_turns(self.scenes[i], rng))))
        drawn.sort(key=lambda one: len(one[1][0]))  # rows of like length share a part: little padding
        size = -(-len(drawn) // self.options.parts)
        parts = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        tokens = sum(target != IGNORED for _, (_, targets) in drawn for target in targets)
        parameters = list(self.projector.parameters())

        def gradients(part: list[Any]) -> tuple[float, Sequence[Tensor]]:
            loss = self.nats([i for i, _ in part], *collate([row for _, row in part]))
            return loss.item(), torch.autograd.grad(loss / tokens, parameters)

        with ThreadPoolExecutor(self.options.threads) as pool:
            losses, found = zip(*pool.map(gradients, parts))
        for parameter, *each in zip(parameters, *found):
            parameter.grad = torch.stack(each).sum(0)
        self.update(self.options.lr * schedule(self.done))
        return sum(losses), tokens

    def nats(self, scenes: list[int], ids: Tensor, targets: Tensor) -> Tensor:
        """Summed nats of the answers' tokens.

        Args:
            ids, targets: int64 [rows, tokens]; the rows show ``scenes``.
        """
        seen = self.projector(self.features[scenes].float()).bfloat16()
        embedded = self.model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == self.encoder.placeholder)[..., None], seen)
        states = self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        answered = targets != IGNORED
        logits = self.model.lm_head(states[answered]).float()
        return functional.cross_entropy(logits, targets[answered], reduction="sum")

    def run(self) -> dict[str, Any]:
        """Train to the planned end, saving on the way; what the last line says."""
        p = self.progress
        while p.words < self.options.word_steps:
            loss = self.word_step(p.words)
            p.words += 1
            if p.words % 50 == 0 or p.words == self.options.word_steps:
                print(f"words {p.words}: squared error {loss:.5f}", flush=True)
        saved, nats, tokens, steps = time.perf_counter(), 0.0, 0, 0
        while self.done < 1:
            started = time.perf_counter()
            step_nats, step_tokens = self.answer_step(p.step)
            p.step, p.tokens, p.seconds = p.step + 1, p.tokens + step_tokens, p.seconds + time.perf_counter() - started
            nats, tokens, steps = nats + step_nats, tokens + step_tokens, steps + 1
            if time.perf_counter() - saved >= self.options.save_seconds or self.done >= 1:
                self._report(nats / tokens, steps / (time.perf_counter() - saved))
                saved, nats, tokens, steps = time.perf_counter(), 0.0, 0, 0
        self.save()
        return {
            "settings": self.settings,
            "steps": p.step,
            "answer_tokens": p.tokens,
            "minutes": round(p.seconds / 60, 2),
            "history": p.history,
        }

    def _report(self, nats: float, steps_per_second: float) -> None:
        p = self.progress
        assert p.history is not None
        p.history.append([p.step, round(p.seconds / 60, 2), round(nats, 4)])
        self.save()
        minutes = p.seconds / 60
        print(f"{minutes:6.1f} min  step {p.step}  {steps_per_second:.3f} steps/s  {nats:.4f} nats a token", flush=True)


def schedule(done: float) -> float:
    """A short warm-up, then a cosine to nothing, by the share of the phase that is done."""
    return min(1.0, done / WARM_UP + 1e-2) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fresh_projector(model: Any, features: Tensor, seed: int) -> Any:
    """The model's projector, made anew: its first layer sees features of mean 0 and deviation 1 (a tower's channels differ 30-fold)."""
    torch.manual_seed(seed)
    projector = model.model.multi_modal_projector
    seen = features[:512].float().flatten(0, 1)
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-4)
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):
            layer.reset_parameters()
        projector.linear_1.weight /= deviation
        projector.linear_1.bias -= projector.linear_1.weight @ mean
    return projector.requires_grad_(True)


def main(arguments: Sequence[str] | None = None) -> None:
    print(json.dumps(Trainer(parse(arguments)).run()))


if __name__ == "__main__":
    main()
