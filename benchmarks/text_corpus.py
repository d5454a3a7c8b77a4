"""Text that any machine has: Python sources and docs of the standard library and of the environment's packages.

Files are deduplicated by content, ordered by a seed, cut off at a size, and 2 % of them (by content hash) are held out. A byte-level BPE is
trained on the others. Everything lands in one folder: ``tokenizer.json``, ``corpus.safetensors`` (``train`` [tokens] and ``heldout``
[blocks, context], int32) and ``corpus.json``, which says what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SUFFIXES = (".py", ".md", ".rst", ".txt")
LARGEST = 200_000  # bytes a file: above it are tables and generated code
HELD_OUT = 50  # one file in so many
END_OF_FILE = "<|endoftext|>"
BLOCKS = 64  # held-out blocks that are kept
# fixtures, generated tables, and other packages' roots inside the standard library's folder
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "data", "datasets", "fixtures", "encodings", "__pycache__", "site-packages")
)
OWN = ("kdcli", "__editable__")  # this project, installed or linked into the environment


def roots() -> list[Path]:
    """The standard library and the running environment's packages."""
    paths = sysconfig.get_paths()
    return [Path(one) for one in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def candidate_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Text files by name and size; own tree, fixtures and generated tables left out."""
    for root in folders:
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in SKIPPED and not name.startswith(OWN)]
            for name in names:
                path = Path(folder) / name
                if name.endswith(SUFFIXES) and not name.startswith(OWN) and path.stat().st_size <= LARGEST:
                    yield path


def choose_texts(folders: Sequence[Path], megabytes: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) texts, no content twice, in an order that only contents and seed decide, up to ``megabytes`` of both."""
    contents: dict[bytes, Path] = {}
    for path in candidate_files(folders):
        contents.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    train: list[str] = []
    held_out: list[str] = []
    left = megabytes * 1e6
    for digest in sorted(contents, key=lambda one: hashlib.sha256(b"%d " % seed + one).digest()):
        raw = contents[digest].read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if int.from_bytes(digest[:8], "big") % HELD_OUT == 0 else train).append(text)
        left -= len(raw)
        if left <= 0:
            break
    return train, held_out


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of exactly ``vocabulary`` tokens, the first of which ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_FILE], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the text gave {tokenizer.get_vocab_size()} tokens, not {vocabulary}: take more megabytes")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """One int32 stream [tokens] of all texts, each followed by the end-of-file token 0."""
    pieces = []
    for start in range(0, len(texts), 256):  # a batch at a time: an Encoding weighs far more than its ids
        for one in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            pieces.append(torch.tensor([*one.ids, 0], dtype=torch.int32))
    return torch.cat(pieces)


def held_out_blocks(stream: torch.Tensor, context: int, blocks: int = BLOCKS) -> torch.Tensor:
    """int32 [blocks, context]: pieces evenly spread over the held-out stream, so that many files have a share."""
    found = len(stream) // context
    if found == 0:
        raise ValueError("less held-out text than one block: take more megabytes")
    chosen = torch.linspace(0, found - 1, min(blocks, found)).long()
    return stream[: found * context].view(found, context)[chosen].contiguous()


def open_corpus(
    work: Path, vocabulary: int, context: int, megabytes: float, seed: int, folders: Sequence[Path] | None = None
) -> dict[str, torch.Tensor]:
    """``train`` int32 [tokens] and ``heldout`` int32 [blocks, context] of ``work``, made when they are not there yet.

    A corpus once made is kept, also when the environment's packages change: a resumed run reads what it has read before.
    """
    wanted = {"vocabulary": vocabulary, "context": context, "megabytes": megabytes, "seed": seed}
    about = work / "corpus.json"
    if about.exists():
        found = json.loads(about.read_text())
        if found["settings"] != wanted:
            raise ValueError(f"{work} holds a corpus of {found['settings']}, not {wanted}: take another --work")
        return load_file(work / "corpus.safetensors")
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = choose_texts(roots() if folders is None else folders, megabytes, seed)
    tokenizer = train_tokenizer(train, vocabulary)
    tokenizer.save(str(work / "tokenizer.json"))
    stream = encode(tokenizer, held_out)
    tensors = {"train": encode(tokenizer, train), "heldout": held_out_blocks(stream, context)}
    save_file(tensors, work / "corpus.safetensors")
    counts = {"files": len(train), "held_out_files": len(held_out)}
    counts |= {"tokens": len(tensors["train"]), "held_out_tokens": len(stream)}
    counts["bytes"] = sum(len(text.encode()) for text in train)
    about.write_text(
        json.dumps({"settings": wanted, **counts}, indent=1) + "\n"
    )  # last: it says that the others are whole
    return tensors
