"""Rows of a cache in an object store or behind a web server: how many requests they cost, and that they are the rows of the local cache."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from cli import main
from student_train.order import Order
from teacher_cache.errors import CacheError, SkipSample
from teacher_cache.reading.cache import TeacherCache
from teacher_cache.reading.cached_samples import CachedSamples
from teacher_cache.shards.disk_cache import DiskCache
from teacher_cache.shards.storage import Storage
from teacher_cache.sources.image_folder import ImageFolder

FIELDS = ("response_hidden", "vision_topk")
COLUMNS = 1 + len(FIELDS)


@pytest.fixture(scope="module")
def uploaded(store: Any, tiny_cache: Path) -> str:
    """``tiny_cache`` in the bucket."""
    store.rate = 0.0
    fsspec.filesystem("s3").put(str(tiny_cache), "bucket/read", recursive=True)
    return "s3://bucket/read"


def open_rows(url: str | Path, disk: DiskCache | None = None) -> CachedSamples:
    return CachedSamples(TeacherCache(str(url)), ["sft"], FIELDS, disk)


def in_training_order(rows: CachedSamples) -> list[str]:
    """Key and answer of every row, micro-batch by micro-batch."""
    order, read = Order(rows.counts, seed=3), []
    rows.expect(order.shards_of(0, 0), order.shards_of(0, 1))
    for start in range(0, order.rows, 4):
        read += rows.read_many([order.at(one) for one in range(start, min(start + 4, order.rows))])
    return [f"{row.key} {row.sample.turns[-1].text} {row.fields['vision_topk'].ids.tolist()}" for row in read]


def tars_asked(store: Any) -> list[tuple[str, str]]:
    """(path, range) of every request for a tar."""
    return [(path, span) for method, path, span in store.asked if path.endswith(".tar")]


def test_without_a_local_cache_a_row_is_one_exact_range_a_column(uploaded: str, healthy: Any, tiny_cache: Path) -> None:
    rows = open_rows(uploaded)
    healthy.asked.clear()
    assert in_training_order(rows) == in_training_order(open_rows(tiny_cache))
    asked = tars_asked(healthy)
    assert len(asked) == len(set(asked)) == COLUMNS * sum(rows.counts) and all(span for _, span in asked)


def test_rows_in_tar_order_come_many_in_a_request(uploaded: str, healthy: Any) -> None:
    samples = TeacherCache(uploaded).column("samples")
    count = len(samples.entries(4))
    assert count > 4
    healthy.asked.clear()
    for row in range(count):
        assert samples.read(4, row)
    assert len(tars_asked(healthy)) == 2


def test_with_a_local_cache_a_tar_is_one_request(uploaded: str, healthy: Any, tiny_cache: Path, tmp_path: Path) -> None:
    expected = in_training_order(open_rows(tiny_cache))
    rows = open_rows(uploaded, DiskCache(tmp_path / "kept", 1 << 30))
    healthy.asked.clear()
    assert in_training_order(rows) == expected
    asked = tars_asked(healthy)
    assert len(asked) == len(set(asked)) == COLUMNS * len(rows.counts) and not any(span for _, span in asked)
    again = open_rows(uploaded, DiskCache(tmp_path / "kept", 1 << 30))  # another process
    for tar in (tmp_path / "kept").glob("*.tar"):
        damaged = bytearray(tar.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        tar.write_bytes(damaged)
    healthy.asked.clear()
    assert in_training_order(again) == expected
    assert len(tars_asked(healthy)) == len(set(tars_asked(healthy))) <= COLUMNS * len(rows.counts)


def losses(run: Path) -> list[float]:
    (metrics,) = run.rglob("metrics.jsonl")
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


@pytest.mark.usefixtures("healthy", "one_thread")
def test_training_through_a_local_cache_is_training_from_disk(
    uploaded: str, tiny_cache: Path, tiny_student: Path, tmp_path: Path
) -> None:
    def train(url: str, name: str, *flags: str) -> Any:
        run = ["--student", str(tiny_student), "--cache", url, "--output-dir", str(tmp_path / name), *flags]
        every = ["--method", "llava-kd", "--stages", "DFT", "--max-steps", "2", "--report-to", "none", *run]
        return CliRunner().invoke(main, ["train-student", *every])

    kept = ["--local-cache", str(tmp_path / "kept")]
    for url, name, flags in (
        (str(tiny_cache), "disk", []),
        (uploaded, "kept", [*kept, "--dataloader-num-workers", "1"]),
    ):
        run = train(url, name, *flags)
        assert run.exit_code == 0, run.output
    assert losses(tmp_path / "kept") == losses(tmp_path / "disk")
    run = train(uploaded, "small", *kept, "--local-cache-gb", "0.00001")
    assert run.exit_code == 1 and "16 shards are read at a time" in run.output


class WebServer(http.server.SimpleHTTPRequestHandler):
    """Files with ranges; ``lists``: whether folders are listed."""

    lists = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, span = (
            Path(self.translate_path(self.path)),
            re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""),
        )
        if not span or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, stop = int(span[1]), min(int(span[2]) + 1, path.stat().st_size)
        self.send_response(206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:stop])

    def list_directory(self, path: Any) -> Any:
        if self.lists:
            return super().list_directory(path)
        self.send_error(403, "no listing")
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    handler = partial(WebServer, directory=str(tiny_cache.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{tiny_cache.name}"
    server.shutdown()


def test_a_cache_behind_a_web_server_can_be_read_only(
    web: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_request: Callable[..., Any]
) -> None:
    expected = in_training_order(open_rows(tiny_cache))
    assert in_training_order(open_rows(web)) == expected
    assert in_training_order(open_rows(web, DiskCache(tmp_path / "kept", 1 << 30))) == expected
    run = CliRunner().invoke(main, ["cache", "status", web])
    assert run.exit_code == 0 and "31 written" in run.output
    with pytest.raises(CacheError, match="can only be read"):
        Storage(web).put_bytes(b"", "anything")
    monkeypatch.setattr(WebServer, "lists", False)
    run = CliRunner().invoke(main, ["cache", "status", web])
    assert run.exit_code == 1 and "does not list its folders" in run.output


def test_pictures_behind_a_web_server_by_the_names_of_their_rows(web: str, tiny_cache: Path) -> None:
    """Their names are those of files: what an address reads otherwise is part of them, and none leads out of the root."""
    folder = tiny_cache.parent / "pictures"
    names = ["1.png", "in/2.png", "a#b.png", "a?b.png", "a%20b.png", "a b.png", "ä.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (tiny_cache.parent / "secret.png").write_bytes(b"secret")
    root = ImageFolder(web.replace(tiny_cache.name, "pictures"))
    assert [root.read(name) for name in names] == [name.encode() for name in names]
    assert root.read("in/../1.png") == b"1.png"
    for name in ("../secret.png", "in/../../secret.png", "/secret.png"):
        with pytest.raises(SkipSample, match="image_path_unsafe"):
            root.read(name)
    with pytest.raises(SkipSample, match="image_missing"):
        root.read("a%23b.png")
