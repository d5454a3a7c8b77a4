"""Records whose checksums are right and whose numbers are not the teacher's: one line that names shard, field and key, before a step."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli import main
from teacher_cache.codecs import container
from teacher_cache.errors import CacheError
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.records import TeacherOutput
from teacher_cache.shards.commit import committed_shards
from teacher_cache.shards.mender import ShardReplacer
from teacher_cache.shards.sealed import seal, unseal
from tests.golden.make_golden import PlainTopKWriter

Tensors = dict[str, torch.Tensor]


def rewrite(
    folder: Path, name: str, change: Callable[[dict[str, bytes]], Any], description: dict[str, Any] | None = None
) -> None:
    """Every sample of a column with its members changed, and every checksum right. description: another one of the field."""
    cache = TeacherCache(str(folder))
    reader = cache.column(name)
    digest = "" if name == "samples" else cache.fields[name]["sha256"]
    if description:
        data = seal(description)
        digest = hashlib.sha256(data).hexdigest()
        (folder / "fields" / name / "field.json").write_bytes(data)
    for shard in committed_shards(cache.storage, reader.column):
        writer = ShardReplacer(cache.storage, reader.column, shard, cache.plan_hash, digest)
        for row, entry in enumerate(reader.entries(shard)):
            members = dict(reader.read(shard, row))
            change(members)
            writer.copy(entry, members)
        for skip in reader.commit(shard).skipped:
            writer.skip(skip)
        writer.commit()


def tensors(change: Callable[[Tensors], Any]) -> Callable[[dict[str, bytes]], Any]:
    def edit(members: dict[str, bytes]) -> None:
        stored = container.unpack(members["safetensors"])
        change(stored)
        members["safetensors"] = container.pack(stored)

    return edit


@pytest.fixture(scope="module")
def plain_cache(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its top-k as plain tensors, as earlier versions wrote it: nothing but their reader says which numbers are the teacher's."""
    folder = tmp_path_factory.mktemp("plain") / "cache"
    shutil.copytree(tiny_cache, folder)
    for name in ("response_topk", "vision_topk"):
        coded = TeacherCache(str(folder)).open_field(name)
        body = unseal((folder / "fields" / name / "field.json").read_bytes(), name)
        body |= {"params": {**body["params"], "coding": "plain", "value_dtype": "float32"}, "calibration": None}
        plain = PlainTopKWriter(name, body["params"])

        def written(members: dict[str, bytes], coded: Any = coded, plain: Any = plain) -> None:
            topk = coded.decode(container.unpack(members["safetensors"]))
            said = TeacherOutput(topk={plain.name.removesuffix("_topk"): topk})
            members["safetensors"] = container.pack(plain.encode(None, said))

        rewrite(folder, name, written, body)
    return folder


def other_part(members: dict[str, bytes]) -> None:
    members["json"] = json.dumps({**json.loads(members["json"]), "part": "elsewhere"}).encode()


CHANGES: dict[str, tuple[str, Callable[[dict[str, bytes]], Any], str]] = {
    "narrow hidden states": (
        "vision_hidden",
        tensors(lambda t: t.update(rows=t["rows"][:, :-1])),
        "rows 47 wide, the teacher's are 48",
    ),
    "wide hidden states": (
        "response_hidden",
        tensors(lambda t: t.update(rows=t["rows"].repeat(1, 2))),
        "rows 96 wide, the teacher's are 48",
    ),
    "hidden states of three dimensions": (
        "vision_hidden",
        tensors(lambda t: t.update(rows=t["rows"][:, :, None])),
        "3 dimensions",
    ),
    "a token that nobody has": (
        "response_topk",
        tensors(lambda t: t["ids"].__setitem__((0, 0), 1 << 30)),
        "a token beyond the",
    ),
    "a negative token": ("response_topk", tensors(lambda t: t["ids"].__setitem__((0, 0), -1)), "a token beyond the"),
    "fewer entries": (
        "vision_topk",
        tensors(lambda t: t.update(ids=t["ids"][:, :3], log_probs=t["log_probs"][:, :3])),
        "3 entries per row, not 8",
    ),
    "more ids than values": ("vision_topk", tensors(lambda t: t.update(log_probs=t["log_probs"][:, :3])), "columns of"),
    "a column for one row": ("response_topk", tensors(lambda t: t.update(log_z=t["log_z"][:1])), "columns of shapes"),
    "a cosine too many": ("affinity", tensors(lambda t: t.update(cosine=t["cosine"][None])), "columns, .* are named"),
    "another part": ("samples", other_part, "its part 'elsewhere' is not the shard's"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_numbers_that_are_not_the_teacher_s(tiny_cache: Path, plain_cache: Path, copy_of, kind: str) -> None:
    name, change, said = CHANGES[kind]
    folder = copy_of(plain_cache if name.endswith("_topk") else tiny_cache)
    rewrite(folder, name, change)
    cache = TeacherCache(str(folder))
    rows = CachedSamples(cache, ["sft"], sorted(cache.fields))
    places = [(p, r) for p, count in enumerate(rows.counts) for r in range(count)]
    with pytest.raises(CacheError, match=f"shard .* {name} .*{said}"):
        rows.read_many(places)


def test_plain_top_k_is_that_of_the_coded_cache(tiny_cache: Path, plain_cache: Path) -> None:
    both = [
        CachedSamples(TeacherCache(str(one)), ["sft"], ["response_topk"]).read(0, 0)
        for one in (tiny_cache, plain_cache)
    ]
    for ours, theirs in zip(*(vars(one.fields["response_topk"]).values() for one in both), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_training_says_one_line(tiny_cache: Path, tiny_student: Path, copy_of, tmp_path: Path, workers: str) -> None:
    name, change, said = CHANGES["narrow hidden states"]
    folder = copy_of(tiny_cache)
    rewrite(folder, name, change)
    run = ["--student", str(tiny_student), "--cache", str(folder), "--output-dir", str(tmp_path / "run")]
    every = ["--method", "llava-kd", "--stages", "DFT", "--max-steps", "1", "--report-to", "none"]
    found = CliRunner().invoke(main, ["train-student", *every, *run, "--dataloader-num-workers", workers])
    assert found.exit_code == 1 and said in found.output and "Traceback" not in found.output


def test_a_head_of_another_width(tiny_cache: Path, tiny_cache_standard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum stands in ``field.json``, which the same stranger wrote."""
    real = container.unpack

    def narrower(data: bytes, place: str) -> Tensors:
        return {key: one[:, 1:] if key == "weight" else one for key, one in real(data, place).items()}

    whole, standard = TeacherCache(str(tiny_cache)), TeacherCache(str(tiny_cache_standard))
    whole.teacher_head("vision_hidden"), standard.low_rank_head("vision_hidden")
    monkeypatch.setattr(container, "unpack", narrower)
    for read in (whole.teacher_head, standard.low_rank_head):
        with pytest.raises(CacheError, match=r"head.* is \d+ × \d+, for 4160 tokens"):
            read("vision_hidden")
