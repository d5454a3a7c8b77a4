"""Caches of the standard profile, what tests of whole captures share, a storage whose writer dies after a number of writes, and an S3
service on loopback that fails as asked."""

from __future__ import annotations

import logging
import multiprocessing
import random
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teacher_cache.shards.storage import Storage


@pytest.fixture
def one_thread():
    """Sums split over threads round differently; one thread makes bytes comparable between processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a capture are forked from a process that has imported what they need. Those that start an interpreter, as a user's do,
    stand in ``test_stopped.py`` (a whole capture by two) and ``executors/test_local.py``."""
    from pipelines.capture.executors import local

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.processes.quiet_threads", "tests.warm_modules"])
    own = {"get_context": lambda method: context, "active_children": multiprocessing.active_children}
    monkeypatch.setattr(local, "multiprocessing", SimpleNamespace(**own))


@pytest.fixture
def checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export is checked by runs in this process; a program of its own, without the project, stands in ``export/test_run.py``."""
    from pipelines.export import check, loaded

    here = lambda folder, rows: {**loaded.compare(str(folder), rows), "project": []}  # noqa: E731
    monkeypatch.setattr(check, "run_fresh", here)


@pytest.fixture(scope="session")
def standard(make_request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of the standard profile, made on one thread."""
    from pipelines.capture.cache_teacher import capture

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("standard") / "cache"
    capture(make_request(out, fields=(), store="standard"))
    torch.set_num_threads(before)
    return out


NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template that writes no token behind an answer."""


@pytest.fixture(scope="session")
def endless_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_teacher`` with a chat template that ends no answer."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny_teacher, folder)
    (folder / "chat_template.jinja").write_text(NO_END)
    return folder


@pytest.fixture(scope="session")
def preparer(teacher_parts) -> Any:
    from teacher_cache.preparing.prepare import Preparer

    return Preparer(*teacher_parts)


@pytest.fixture(scope="session")
def own_modules() -> Callable[[Path], Path]:
    """``own_modules(folder)``: a user's own modules with names of ours, and of the library, that must not be imported in our place."""

    def write(folder: Path) -> Path:
        for name in ("cli.py", "teacher_cache.py", "student_train/__init__.py", "pipelines/__init__.py", "socket.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"raise SystemExit('the user\\'s own {name} was imported')\n")
        return folder

    return write


class Mortal:
    """Storage whose methods ``names`` fail after ``budget`` calls; below 0 nothing fails."""

    class Killed(BaseException):
        """The process dies: nothing catches it, nothing is cleaned up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str):
        self.budget = -1
        monkeypatch.setattr("teacher_cache.shards.writer.ShardWriter.abandon", lambda writer: None)
        # What it leaves in ``progress/`` is the word of this process, which lives on.
        monkeypatch.setattr("pipelines.capture.presence.refuse_others", lambda *_: None)
        for name in names:
            monkeypatch.setattr(Storage, name, self._dying(getattr(Storage, name)))

    def _dying(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(storage: Storage, *arguments: Any, **named: Any) -> Any:
            if any(str(one).startswith("progress/") for one in arguments):  # said by threads, when they come to it
                return real(storage, *arguments, **named)
            if self.budget == 0:
                raise self.Killed
            self.budget -= 1
            return real(storage, *arguments, **named)

        return call

    def until_done(self, job: Callable[[], Any], budget: int, look: Callable[[], None] = lambda: None) -> int:
        """Run ``job`` again and again, each time dying after ``budget`` calls, with a ``look`` after every death; how often it died."""
        for deaths in range(200):
            self.budget = budget
            try:
                job()
            except self.Killed:
                self.budget = -1
                look()
            else:
                self.budget = -1
                return deaths
        raise AssertionError("the job never ends")


@pytest.fixture
def make_mortal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mortal]:
    """``make_mortal("put_file", "put_new")`` → Mortal."""
    return lambda *names: Mortal(monkeypatch, *names)


class Faulty:
    """The store's application; ``rate`` of its requests are answered with 503 SlowDown or 500, and counted.

    refuse: (request, after it was served) → status in place of the real one, or None.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self.application, self.rate, self.failed, self.served = application, 0.0, 0, 0
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.refuse: Callable[[dict[str, Any], bool], str | None] = lambda environ, served: None
        self._random = random.Random(1)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        if status := self.refuse(environ, False):
            return self._fail(environ, start_response, status)
        if self._random.random() < self.rate:
            status = self._random.choice(["503 Slow Down", "500 Internal Server Error", "429 Too Many Requests"])
            return self._fail(environ, start_response, status)
        self.served += 1
        status = self.refuse(environ, True)
        if status is None:
            return self.application(environ, start_response)
        list(self.application(environ, lambda *_: None))  # done, and the answer is lost
        return self._fail({}, start_response, status)

    def _fail(self, environ: dict[str, Any], start_response: Callable[..., Any], status: str) -> Iterable[bytes]:
        self.failed += 1
        if environ:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = (
            "AccessDenied" if status.startswith("403") else "SlowDown" if status.startswith("503") else "InternalError"
        )
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


class Proxy:
    """Stands before a server; of its answers, the share ``rate`` ends in the middle: connection reset, cut, or silent."""

    def __init__(self, target: tuple[str, int], silence_s: float):
        self.target, self.silence_s, self.rate, self.broken = (
            target,
            silence_s,
            0.0,
            {"reset": 0, "cut": 0, "silent": 0},
        )
        self._random, self._listener = random.Random(2), socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self.target)
                asked = threading.Event()
                threading.Thread(target=self._pump, args=(client, server, asked, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, asked, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asked: threading.Event, answers: bool) -> None:
        with suppress(OSError), source, sink:
            while piece := source.recv(1 << 14):
                begins = answers and asked.is_set()  # the first piece of an answer
                (asked.clear if answers else asked.set)()
                if begins and self._random.random() < self.rate:
                    kind = self._random.choice(sorted(self.broken))
                    self.broken[kind] += 1
                    sink.sendall(piece[: len(piece) // 2])
                    if kind == "silent":
                        time.sleep(self.silence_s)
                    if kind == "reset":
                        sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                sink.sendall(piece)

    def close(self) -> None:
        self._listener.close()


MOMENT_S = 0.02


@pytest.fixture(scope="module")
def store() -> Iterator[Faulty]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import fsspec
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = Faulty(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**names, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()  # made under another service's address
        with suppress(FileExistsError):  # moto's state outlives a server
            fsspec.filesystem("s3").mkdir("bucket")
        faulty.port = server.server_port  # type: ignore[attr-defined]
        yield faulty
        fsspec.filesystem("s3").clear_instance_cache()
    server.shutdown()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries nobody waits longer than a moment: neither ours nor the libraries below."""
    import asyncio

    import botocore.retries.standard

    from teacher_cache.shards import remote

    wait = asyncio.sleep
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", MOMENT_S)
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, result=None: wait(min(seconds, MOMENT_S), result))
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: MOMENT_S, raising=True)


@pytest.fixture
def healthy(store: Faulty, hasty: None) -> Faulty:
    store.rate, store.refuse = 0.0, lambda environ, served: None
    store.asked.clear()
    return store


@pytest.fixture
def shaky(healthy: Faulty, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the store, through which every request goes; connections may be silent for half a second."""
    import fsspec

    proxy = Proxy(("127.0.0.1", healthy.port), silence_s=0.8)  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("KDCLI_STORE_TIMEOUT", "0.5")
    fsspec.filesystem("s3").clear_instance_cache()
    yield proxy
    proxy.close()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(cache, planted): 12 captions and 72 chat rows by the demo teacher, a fifth of the answers made wrong.

    planted: (row, number of the answer) → as in ``wrong_answers.json``. Top-8 of response rows, top-2 of vision rows.
    """
    from pipelines.capture.cache_teacher import capture
    from pipelines.capture.worker import CaptureRequest
    from pipelines.demo.run import TEACHER, DemoRecipe, make_world
    from pipelines.settings import CaptureSettings
    from teacher_cache.teachers.transformers import TeacherSpec

    folder = tmp_path_factory.mktemp("noisy")
    world, data = make_world(
        folder / "world", DemoRecipe(captions=12, train=72, heldout=7, defects=0, wrong_answers=0.2), 0
    )
    params: dict[str, dict[str, Any]] = {"response_topk": {"k": 8}, "vision_topk": {"k": 2}}
    settings = CaptureSettings(shards=6, fields=tuple(params), workers=1)
    capture(CaptureRequest(TeacherSpec(str(TEACHER)), data, str(folder / "cache"), settings, params))
    return folder / "cache", {(one["row"], one["turn"]): one for one in world.wrong}
