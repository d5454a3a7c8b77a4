"""Trains a larger language model on local text, for codec benchmarks that need real hidden states and a real, wide head.

    python -m benchmarks.text_teacher [--minutes 50] [--work runs/text_teacher]
    python -m benchmarks.text_teacher --work runs/text_student --corpus runs/text_teacher --layers 2 --width 256

Nothing is downloaded: the text is Python sources and docs of this machine (``text_corpus``). A run that was interrupted goes on where its
last checkpoint was. ``<work>/model`` is a folder of transformers, with ``tokenizer.json`` and ``heldout.safetensors``; it is there from the
first ten minutes on, and ``load_text_teacher`` reads it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import machine
from benchmarks.text_corpus import open_corpus
from benchmarks.text_model import ColumnSampler, build_model, build_optimizer, exact_loss, head_loss, sampled_loss

WARM_UP = 0.02  # of the planned training
FREE_TO_CHANGE = ("work", "corpus", "minutes", "steps", "threads", "compile", "save_seconds", "publish_seconds")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/text_teacher"), help="corpus, checkpoint, model/")
    parser.add_argument("--corpus", type=Path, default=None, help="--work of another run: its tokenizer and its tokens")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time; the learning rate ends with it")
    parser.add_argument("--steps", type=int, default=None, help="plan by steps instead: the same run on any machine")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512, help="D, a multiple of 64 (one head)")
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=256, help="tokens a block")
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--sampled", type=float, default=0.0, help="share of training with a sampled softmax, at first")
    parser.add_argument("--megabytes", type=float, default=64.0, help="text to take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--save-seconds", type=float, default=120.0, help="a checkpoint so often")
    parser.add_argument("--publish-seconds", type=float, default=600.0, help="held-out loss and model folder so often")
    return parser.parse_args(arguments)


@dataclass
class Progress:
    """How far a run is; ``seconds`` are of training alone, ``history`` is [minutes, tokens, held-out nats a token]."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)


class Trainer:
    """One run: all that decides its future is in its options, its corpus and its checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        self.machine = machine("cpu")
        self.corpus_folder = options.corpus or options.work
        options.work.mkdir(parents=True, exist_ok=True)
        sizes = (options.vocabulary, options.context, options.megabytes, options.seed)
        self.corpus = open_corpus(self.corpus_folder, *sizes)
        self.model = build_model(options.vocabulary, options.width, options.layers, options.context, options.seed)
        self.body = torch.compile(self.model.model) if options.compile else self.model.model
        self.optimizer = build_optimizer(self.model, options.lr)
        self.sampler = ColumnSampler(
            self.corpus["train"], options.vocabulary, options.vocabulary // 5, options.vocabulary // 16
        )
        self.progress = Progress()
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._load()

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.options).items() if name not in FREE_TO_CHANGE}

    @property
    def done(self) -> float:
        """Share of the planned training, 0 to 1."""
        if self.options.steps is not None:
            return self.progress.step / self.options.steps
        return self.progress.seconds / (60 * self.options.minutes)

    def _load(self) -> None:
        path = self.options.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{path} is of a run with {state['settings']}, not {self.settings}: take another --work")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """The checkpoint, replaced whole."""
        draft = self.options.work / "state.draft.pt"
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "progress": asdict(self.progress), "settings": self.settings}, draft)
        draft.replace(self.options.work / "state.pt")

    def batch(self, step: int) -> Tensor:
        """int64 [batch, context + 1]; every epoch visits all blocks in an order of its own."""
        context, train = self.options.context, self.corpus["train"]
        blocks = (len(train) - 1) // context
        rows = []
        for i in range(step * self.options.batch, (step + 1) * self.options.batch):
            if self.order[0] != i // blocks:
                generator = torch.Generator().manual_seed(self.options.seed + i // blocks)
                self.order = (i // blocks, torch.randperm(blocks, generator=generator))
            start = int(self.order[1][i % blocks]) * context
            rows.append(train[start : start + context + 1])
        return torch.stack(rows).long()

    def train_step(self) -> float:
        """Nats a token of one batch, before the update."""
        ids = self.batch(self.progress.step)
        rate = min(1.0, self.done / WARM_UP + 1e-2) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = self.body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss_of = head_loss
        if self.done < self.options.sampled:
            generator = torch.Generator().manual_seed(self.progress.step)
            loss_of = partial(sampled_loss, sampler=self.sampler, generator=generator)
        loss = loss_of(states.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def run(self) -> dict[str, Any]:
        """Train to the planned end, saving and publishing on the way; what the last line says."""
        saved = published = reported = time.perf_counter()
        losses: list[float] = []
        while self.done < 1:
            started = time.perf_counter()
            losses.append(self.train_step())
            self.progress.step += 1
            self.progress.tokens += self.options.batch * self.options.context
            now = time.perf_counter()
            self.progress.seconds += now - started
            if now - published >= self.options.publish_seconds:
                self.publish()
                published = time.perf_counter()
            if now - saved >= self.options.save_seconds:
                self.save()
                self._print(losses, now - reported)
                losses = []
                saved = reported = time.perf_counter()
        self.publish()
        self.save()
        return self.summary()

    def _print(self, losses: list[float], seconds: float) -> None:
        speed = len(losses) * self.options.batch * self.options.context / seconds
        p = self.progress
        mean = sum(losses) / len(losses)
        print(
            f"{p.seconds / 60:6.1f} min  step {p.step}  {p.tokens} tokens  {speed:.0f}/s  train {mean:.3f}", flush=True
        )

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats a token over the held-out blocks, all in float32."""
        weight, losses = self.model.lm_head.weight, []
        for ids in self.corpus["heldout"].long().split(self.options.batch):
            states = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            losses += [exact_loss(states.flatten(0, 1), weight, ids[:, 1:].flatten())] * len(ids)
        return float(torch.stack(losses).mean())

    def publish(self) -> None:
        """Measure, and replace the model folder whole."""
        loss, p = self.held_out(), self.progress
        now = [round(p.seconds / 60, 2), p.tokens, round(loss, 4)]
        p.history = [*(one for one in p.history if one[1] != p.tokens), now]
        print(
            f"{p.seconds / 60:6.1f} min  held-out {loss:.4f} nats a token, perplexity {math.exp(loss):.1f}", flush=True
        )
        draft, old, folder = (self.options.work / name for name in ("model.draft", "model.old", "model"))
        shutil.rmtree(draft, ignore_errors=True)
        self.model.save_pretrained(draft)
        save_file({"tokens": self.corpus["heldout"]}, draft / "heldout.safetensors")
        shutil.copy(self.corpus_folder / "tokenizer.json", draft)
        (draft / "training.json").write_text(json.dumps(self.summary(), indent=1) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        p, loss = self.progress, self.progress.history[-1][-1]
        return {
            "benchmark": "text_teacher",
            "settings": self.settings,
            "machine": self.machine,
            "parameters": sum(q.numel() for q in self.model.parameters()),
            "planned": {"minutes": self.options.minutes, "steps": self.options.steps, "done": round(self.done, 4)},
            "steps": p.step,
            "tokens": p.tokens,
            "minutes": round(p.seconds / 60, 2),
            "tokens_per_second": round(p.tokens / p.seconds, 1),
            "heldout_nats_per_token": loss,
            "heldout_perplexity": round(math.exp(loss), 2),
            "history": p.history,
        }


def load_text_teacher(folder: str | Path) -> tuple[Any, Tensor]:
    """(model in float32, in evaluation mode; held-out tokens int32 [blocks, context]) of a ``--work`` folder or its ``model/``."""
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if (folder / "model").is_dir():
        folder = folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_file(folder / "heldout.safetensors")["tokens"]


def main(arguments: Sequence[str] | None = None) -> None:
    print(json.dumps(Trainer(parse(arguments)).run()))


if __name__ == "__main__":
    main()
