"""The order of training rows: every row once an epoch, a pure function, the same from any step on and for any world size."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from student_train import stream
from student_train.loader_signals import held_back
from student_train.order import BLOCK_SHARDS, MicroBatches, Order
from teacher_cache.errors import CacheError, CompatibilityError, KdcliError

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any)


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(0, 2**32))
def test_every_row_once_an_epoch(counts: list[int], seed: int) -> None:
    order = Order(counts, seed)
    every = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in range(2):
        seen = [order.at(epoch * order.rows + i) for i in range(order.rows)]
        assert len(seen) == len(every) and set(seen) == every


@settings(deadline=None, max_examples=30)
@given(COUNTS, st.integers(0, 1000), st.data())
def test_a_position_depends_on_nothing_else(counts: list[int], seed: int, data: st.DataObject) -> None:
    """Whatever was asked before, in another process, after pickling."""
    order = Order(counts, seed)
    expected = [order.at(p) for p in range(3 * order.rows)]
    other = pickle.loads(pickle.dumps(order))
    asked = data.draw(st.lists(st.integers(0, 3 * order.rows - 1), max_size=12))
    assert [other.at(p) for p in asked] == [expected[p] for p in asked]


def test_blocks_keep_reading_nearly_sequential_and_mix_sixteen_shards() -> None:
    order = Order([10] * 50, seed=3)
    epoch = [order.at(p)[0] for p in range(order.rows)]
    for start in range(0, order.rows, 10 * BLOCK_SHARDS):
        block = epoch[start : start + 10 * BLOCK_SHARDS]
        assert len(set(block)) == min(BLOCK_SHARDS, 50 - start // 10)
        assert all(count == 10 for count in Counter(block).values()), "a shard is read in one block only"
    assert len(set(epoch[:32])) >= 10, "one batch sees many shards"
    assert epoch != [order.at(order.rows + p)[0] for p in range(order.rows)], "another epoch, another order"
    assert epoch != [Order([10] * 50, seed=4).at(p)[0] for p in range(order.rows)]


SPLITS = st.tuples(st.integers(1, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None, max_examples=100)
@given(SPLITS)
def test_processes_share_every_step_exactly(split: tuple[int, int, int, int]) -> None:
    """(total, micro batch, accumulation, world): each sample once, in order of steps; all processes make as many micro-batches."""
    total, micro, accumulate, world = split
    global_batch = micro * accumulate * world
    ranks = [MicroBatches(total, global_batch, micro, rank, world, 0) for rank in range(world)]
    seen: list[int] = []
    for step in range(ranks[0].steps()):
        mine = [one.of_step(step) for one in ranks]
        assert all(0 < len(batch) <= micro for batches in mine for batch in batches)
        assert len({len(batches) + one.fillers(step) for batches, one in zip(mine, ranks)}) == 1
        assert all(len(batches) <= accumulate for batches in mine)
        of_step = sorted(p for batches in mine for batch in batches for p in batch)
        assert of_step == list(range(step * global_batch, step * global_batch + len(of_step)))
        seen += of_step
    assert seen == list(range(total))


@settings(deadline=None, max_examples=50)
@given(SPLITS, st.data())
def test_resuming_continues_where_it_was(split: tuple[int, int, int, int], data: st.DataObject) -> None:
    total, micro, accumulate, world = split
    make = lambda first: MicroBatches(total, micro * accumulate * world, micro, world - 1, world, first)  # noqa: E731
    whole = make(0)
    first = data.draw(st.integers(0, whole.steps()))
    done = sum(len(whole.of_step(step)) + whole.fillers(step) for step in range(first))
    assert list(make(first)) == list(whole)[done:]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_other_numbers_of_processes_see_each_remaining_sample_once(
    total: int, global_batch: int, micro: int, worlds: list[int]
) -> None:
    """A run that is stopped and resumed with another number of processes, again and again, at any step."""
    seen: list[int] = []
    steps = -(-total // global_batch)
    for number, world in enumerate(worlds):
        first, stop = (steps * number // len(worlds), steps * (number + 1) // len(worlds))
        ranks = [MicroBatches(total, global_batch, micro, rank, world, first) for rank in range(world)]
        for step in range(first, stop):
            own = [one.of_step(step) for one in ranks]
            assert len({len(batches) + one.fillers(step) for batches, one in zip(own, ranks)}) == 1
            seen += sorted(p for batches in own for batch in batches for p in batch)
    assert seen == list(range(total))


def keys_of(batches: Any) -> list[tuple[int, list[tuple[str, ...]]]]:
    return [(step, [one.batch.keys for one in each]) for step, each in batches]


def test_loader_processes_and_resuming_give_the_same_batches(open_stage: Callable[..., Any], tiny_cache: Path) -> None:
    """In the same order and with the same teacher fields, whoever reads them."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, alone = open_stage(tiny_cache, **sizes)
    _, with_workers = open_stage(tiny_cache, dataloader_num_workers=2, **sizes)
    expected = list(alone(0))
    assert len(keys_of(expected)) == 6
    found = list(with_workers(0))
    assert keys_of(found) == keys_of(expected)
    assert keys_of(alone(4)) == keys_of(expected)[4:] == keys_of(with_workers(4))
    for (_, ours), (_, theirs) in zip(found, expected):
        for one, other in zip(ours, theirs):
            for name in other.fields:
                pairs = zip(one.fields[name], other.fields[name])
                assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tar_stops_training_and_names_the_shard(
    open_stage: Callable[..., Any], tiny_cache: Path, copy_of: Callable[[Path], Path], workers: int
) -> None:
    """One flipped byte in a field's tar: no row is skipped, no other row stands in; one line."""
    cache = copy_of(tiny_cache)
    tar = sorted((cache / "fields" / "vision_hidden" / "data").glob("000003-*.tar"))[0]
    with tarfile.open(tar) as opened:
        member = max(opened.getmembers(), key=lambda one: one.size)
    data = bytearray(tar.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    tar.write_bytes(data)
    trainer, batches_from = open_stage(cache, dataloader_num_workers=workers)
    with pytest.raises(CacheError, match=r"shard 000003 of fields/vision_hidden is damaged.*checksum") as caught:
        trainer.train(batches_from)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


NARROW = (48, 96)
"""Of pictures that the student below does not take."""


def refuses_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a layout of such a picture is divided by nothing."""
    from teacher_cache.preparing import prepare

    known = prepare.image_layout

    def layout(config: Any, processor: Any, sizes: Any, *rest: Any) -> Any:
        return 1 // 0 if NARROW in sizes else known(config, processor, sizes, *rest)

    monkeypatch.setattr(prepare, "image_layout", layout)


@pytest.fixture(scope="module")
def narrow_cache(tmp_path_factory: pytest.TempPathFactory, make_request: Callable[..., Any]) -> Callable[..., Path]:
    """``narrow_cache(pattern)`` → a cache of one row a letter, whose picture is narrow where the letter is n."""
    from pipelines.capture.cache_teacher import capture
    from teacher_cache.sources import DataSpec

    def make(pattern: str, text: str = "") -> Path:
        folder = tmp_path_factory.mktemp("narrow")
        rows = []
        for number, letter in enumerate(pattern):
            PIL.Image.new("RGB", NARROW if letter == "n" else (96, 96), (9 * number, 0, 0)).save(
                folder / f"{number}.png"
            )
            said = [("human", "<image>\nwhat?"), ("gpt", f"{text}picture {number}")]
            turns = [{"from": who, "value": text} for who, text in said]
            rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        (folder / "rows.json").write_text(json.dumps(rows))
        spec = DataSpec("sft", str(folder / "rows.json"), image_root=str(folder))
        capture(make_request(folder / "cache", data=(spec,), shards=1, fields=("response_topk",)))
        return folder / "cache"

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_the_students_processor_refuses_are_left_out_and_counted(
    open_stage: Callable[..., Any], narrow_cache: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Loss and gradients are those of the rows that are left; a micro-batch without any counts for nothing."""
    cache = narrow_cache("ononoono")
    how = {"method": "kd", "parts": ("sft",), "dataloader_num_workers": workers}
    refuses_narrow(monkeypatch)
    trainer, batches_from = open_stage(cache, per_device_train_batch_size=1, gradient_accumulation_steps=8, **how)
    ((step, batches),) = list(batches_from(0))
    assert sum(one.filler for one in batches) == 3 == sum(len(one.refused) for one in batches)
    assert all(one.filler == bool(one.refused) for one in batches)
    lines = [line for one in batches for line in one.refused]
    assert all("rows.json" in line and "ZeroDivisionError" in line and "48 × 96" in line for line in lines)
    result = trainer.step(step, batches)
    assert result.samples == 5 and result.refused == 3 and result.left_out == tuple(lines)
    assert result.values()["refused"] == 3
    together, batches_from = open_stage(cache, per_device_train_batch_size=8, **how)
    ((_, (whole,)),) = list(batches_from(0))
    assert not whole.filler and len(whole.batch.keys) == 5 and len(whole.refused) == 3
    assert together.step(0, [whole]).loss == pytest.approx(result.loss, rel=1e-5)


def test_a_student_that_refuses_all_rows_is_refused(
    open_stage: Callable[..., Any], narrow_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = narrow_cache("nnn")
    refuses_narrow(monkeypatch)
    with pytest.raises(CompatibilityError, match=r"row .*rows\.json.*nor any of the 64 rows after it: choose another"):
        open_stage(cache, method="kd", parts=("sft",))


def test_what_is_left_out_is_told(
    narrow_cache: Any, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row when it is met, all of them at the end, and in the metrics of their steps."""
    from pipelines.settings import Settings
    from pipelines.train.train_student import train
    from student_train.config import StageSettings, TrainSettings

    cache = narrow_cache("onoonooo")
    refuses_narrow(monkeypatch)
    asked = TrainSettings(
        student=str(tiny_student), output_dir=str(tmp_path / "run"), report_to="none", per_device_train_batch_size=2
    )
    told: list[str] = []
    settings = Settings(train=asked, stages={"DFT": StageSettings(parts=("sft",))})
    train(str(cache), "kd", settings, "DFT", say=told.append)
    (folder,) = (tmp_path / "run").glob("*-DFT")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(one.get("refused", 0) for one in steps) == 2 and sum(one["samples"] for one in steps) == 6
    first, last = [note for note in told if "left out" in note]
    assert first.startswith("note: row ") and "ZeroDivisionError" in first and "metrics.jsonl" in first
    assert last == f"note: {folder.name} left out 2 rows since its start that the student does not take"


def test_a_word_without_a_row_in_the_students_embedding_is_one_line(
    open_stage: Callable[..., Any], narrow_cache: Any, tiny_student: Path, tmp_path: Path
) -> None:
    """A student whose embedding was cut: a device would fail without a word."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = (one.from_pretrained(tiny_student) for one in (AutoModelForImageTextToText, AutoProcessor))
    processor.tokenizer.add_tokens(["qwx"])
    number = processor.tokenizer.convert_tokens_to_ids("qwx")
    model.resize_token_embeddings(number)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "cut")
    cache = narrow_cache("o", text="qwx ")
    with pytest.raises(
        CompatibilityError, match=rf"'qwx' \(id {number}\) is beyond the {number} rows .*: resize_token_embeddings"
    ):
        open_stage(cache, method="sft", stage="SFT", parts=("sft",), student=tmp_path / "cut")


class Deadly(Dataset):
    """Rows that end the process that reads the third of them."""

    rows = SimpleNamespace(pause=lambda: None)

    def __getitem__(self, position: int) -> int:
        if position == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return position


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "behind another loader"])
def test_a_killed_loader_process_is_one_line(monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    """Wherever this process is meanwhile: nothing is raised in the middle of a step."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if earlier:
        monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
        torch.utils.data._utils.signal_handling._set_SIGCHLD_handler()
        assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(stream, "Join", lambda pad_id, packing: list)
    steps = stream.step_batches(Deadly(), MicroBatches(6, 1, 1, 0, 1, 0), 0, workers=1)  # type: ignore[arg-type]
    assert next(steps)[0] == 0
    time.sleep(0.5)  # the process is dead by now, and this one is at its step
    with pytest.raises(KdcliError, match=r"a loader process died .*fewer --dataloader-num-workers"):
        list(steps)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


LOADER = """
import time
from student_train.loader_signals import leave_signals
leave_signals(0)
open(ready, "w").write("ready")
time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_loader_process_is_ended_by_its_parent_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under forkserver its parent is none that ``getppid`` knows."""
    ready = tmp_path / "ready"
    process = multiprocessing.get_context(method).Process(target=exec, args=(LOADER, {"ready": str(ready)}))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    with held_back():
        process.start()
    try:
        deadline = time.monotonic() + 60
        while not ready.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        subprocess.run(["sh", "-c", f"kill {process.pid}"], check=True)
        process.join(0.3)
        assert process.is_alive(), "somebody else's signal"
        process.terminate()
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
