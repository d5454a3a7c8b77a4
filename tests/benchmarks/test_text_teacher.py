from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from benchmarks import text_corpus, text_teacher
from benchmarks.text_model import ColumnSampler, exact_loss, head_loss, sampled_loss
from benchmarks.text_teacher import Trainer, load_text_teacher, parse

WORDS = ("alpha", "beta", "gamma", "return", "import", "self", "value", "None")


@pytest.fixture
def some_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of 300 small sources, with a copy and files that must not be read."""
    root = tmp_path / "packages"
    (root / "lib" / "tests").mkdir(parents=True)
    (root / "kdcli").mkdir()
    for i in range(300):
        lines = [f"def {WORDS[i % 8]}_{i}(self): return {WORDS[(i * j) % 8]}_{j}" for j in range(5)]
        (root / "lib" / f"m{i}.py").write_text("\n".join(lines))
    (root / "lib" / "copy.md").write_text((root / "lib" / "m0.py").read_text())
    (root / "lib" / "large.txt").write_text("x" * (text_corpus.LARGEST + 1))
    (root / "lib" / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    (root / "lib" / "tests" / "fixture.py").write_text("FIXTURE = 1")
    (root / "kdcli" / "own.py").write_text("OWN = 1")
    monkeypatch.setattr(text_corpus, "roots", lambda: [root])
    return root


def flags(work: Path, *more: str) -> list[str]:
    sizes = "--vocabulary 320 --width 64 --layers 1 --context 16 --batch 2 --steps 8 --threads 1 --save-seconds 0"
    return ["--work", str(work), *sizes.split(), *more]


def test_files_are_deduplicated_split_by_content_and_ordered_by_seed(some_text: Path) -> None:
    train, held_out = text_corpus.choose_texts([some_text], 1.0, 0)
    assert len(train) + len(held_out) == 300 and held_out
    assert not set(train) & set(held_out)
    assert not any("FIXTURE" in text or "OWN" in text for text in train + held_out)
    again, other = (text_corpus.choose_texts([some_text], 1.0, seed) for seed in (0, 1))
    assert again == (train, held_out)
    assert other[0] != train and set(other[1]) == set(held_out)
    assert len(text_corpus.choose_texts([some_text], 0.01, 0)[0]) < 100


def test_a_run_ends_with_a_folder_that_loads(
    some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    text_teacher.main(flags(work, "--publish-seconds", "0"))
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, tokens = load_text_teacher(work)
    assert tokens.dtype == torch.int32 and tokens.shape[1] == 16
    with torch.no_grad():
        found = model(input_ids=tokens.long())
        states = model.model(input_ids=tokens.long()).last_hidden_state
    torch.testing.assert_close(states @ model.lm_head.weight.T, found.logits)
    loss = functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().long())
    assert body["heldout_nats_per_token"] == pytest.approx(float(loss), abs=1e-3)
    assert body["steps"] == 8 and body["tokens"] == 8 * 2 * 16 and len(body["history"]) >= 8
    text = Tokenizer.from_file(str(work / "model" / "tokenizer.json")).decode(tokens[0].tolist())
    assert "_" in text
    assert {path.name for path in work.iterdir() if path.is_dir()} == {"model"}


def test_a_resumed_run_equals_an_uninterrupted_one(
    some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--sampled", "0.6")
    Trainer(parse(flags(tmp_path / "whole", *more))).run()
    train_step = Trainer.train_step

    def broken(self: Trainer) -> float:
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return train_step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", broken)
        Trainer(parse(flags(tmp_path / "parts", *more))).run()
    resumed = Trainer(parse(flags(tmp_path / "parts", *more)))
    assert resumed.progress.step == 3
    resumed.run()
    whole, parts = (load_file(tmp_path / one / "model" / "model.safetensors") for one in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_student_reads_the_tokens_of_its_teacher(some_text: Path, tmp_path: Path) -> None:
    teacher = Trainer(parse(flags(tmp_path / "teacher")))
    (some_text / "lib" / "m1.py").write_text("changed = 1")
    Trainer(parse(flags(tmp_path / "student", "--corpus", str(tmp_path / "teacher"), "--width", "32"))).run()
    model, tokens = load_text_teacher(tmp_path / "student")
    assert model.config.hidden_size == 32 and torch.equal(tokens, teacher.corpus["heldout"])
    assert not (tmp_path / "student" / "corpus.json").exists()


def test_other_settings_do_not_resume(some_text: Path, tmp_path: Path) -> None:
    Trainer(parse(flags(tmp_path))).save()
    with pytest.raises(ValueError, match="another --work"):
        Trainer(parse(flags(tmp_path, "--lr", "1")))
    with pytest.raises(ValueError, match="holds a corpus"):
        Trainer(parse(flags(tmp_path, "--seed", "1")))


def test_head_loss_and_its_gradients_are_those_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(24, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator).mul(0.5).requires_grad_()
    targets = torch.randint(50, (24,), generator=generator)
    wanted = functional.cross_entropy(states @ weight.T, targets)
    exact = torch.autograd.grad(wanted, (states, weight))
    loss = head_loss(states, weight, targets)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-2)
    assert float(exact_loss(states, weight, targets, rows=7).detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-5
    )
    for ours, theirs in zip(torch.autograd.grad(loss, (states, weight)), exact):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_sampled_loss_estimates_the_loss_of_all_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(24, 16, generator=generator), torch.randn(4000, 16, generator=generator) * 0.3
    targets = torch.randint(40, (24,), generator=generator)
    sampler = ColumnSampler(targets, 4000, frequent=100, sampled=800)
    columns, places, _ = sampler(targets, generator)
    assert torch.equal(columns[places], targets) and 800 < len(columns) <= 900
    estimates = [sampled_loss(states, weight, targets, sampler, generator) for _ in range(8)]
    wanted = functional.cross_entropy(states @ weight.T, targets)
    assert float(torch.stack(estimates).mean()) == pytest.approx(float(wanted), rel=0.02)
