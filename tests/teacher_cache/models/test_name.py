"""A mistyped model: what its name can be is looked at first, and a hub is asked once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from teacher_cache.errors import KdcliError
from teacher_cache.models import name as model_name
from teacher_cache.models.name import check_model_name


class Hub(BaseHTTPRequestHandler):
    """Answers every request as its server was told, and remembers it."""

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        status, error_code = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HTTPServer]:
    """A hub on loopback that has no model, asked instead of the real one; nothing is in the local cache."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.answer = [], (404, "RepoNotFound")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask(monkeypatch, server.server_port, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model_name._asked_hub.cache_clear()


def refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(KdcliError) as caught:
        check_model_name(f"model {name!r}", name, revision)
    assert "\n" not in str(caught.value) and "give a model folder or a hub id" in str(caught.value)
    return str(caught.value)


NO_ID = [
    "./model",
    "../model",
    "/no/model",
    "runs/03-DFT/model",
    "~/model",
    "models/",
    "a b/c",
    "-x",
    "owner//name",
    "",
    "C:\\m",
]


@pytest.mark.parametrize("name", NO_ID)
def test_what_is_no_hub_id_asks_nobody(
    name: str, hub: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refusal(name) or name == ""
    assert not hub.asked  # type: ignore[attr-defined]


def test_folders(hub: HTTPServer, tmp_path: Path, tiny_student: Path) -> None:
    check_model_name("student", str(tiny_student))
    (tmp_path / "03-DFT").mkdir()
    assert "no config.json in that folder" in refusal(str(tmp_path / "03-DFT"))
    (tmp_path / "03-DFT" / "model").symlink_to(tiny_student)
    assert f"its model is {tmp_path / '03-DFT' / 'model'}" in refusal(str(tmp_path / "03-DFT"))
    assert "it is a file" in refusal(str(tiny_student / "config.json"))
    assert not hub.asked  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "RepoNotFound"), "the hub has no such model, or a private one"),
        ((403, "GatedRepo"), "request access"),
        ((404, "RevisionNotFound"), "the hub has no revision 'v9' of it"),
        ((404, "EntryNotFound"), "no config.json"),
    ],
)
def test_the_hub_is_asked_once(hub: HTTPServer, answer: tuple[int, str | None], said: str) -> None:
    hub.answer = answer  # type: ignore[attr-defined]
    for _ in range(2):
        assert said in refusal("liuhaotian/lava-v1.5-7b", "v9")
    assert hub.asked == ["/liuhaotian/lava-v1.5-7b/resolve/v9/config.json"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [200, 429, 503])
def test_a_hub_that_answers_otherwise_is_left_to_transformers(hub: HTTPServer, status: int) -> None:
    hub.answer = (status, None)  # type: ignore[attr-defined]
    check_model_name("model", "owner/name")


def test_a_hub_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One try within the time that it has; then a copy in the local cache serves, for this process and its children."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask(monkeypatch, silent.getsockname()[1], tmp_path)
        monkeypatch.setattr(model_name, "HUB_TIMEOUT", 0.3)
        started = time.monotonic()
        assert "no such folder, and the hub does not answer (" in refusal("owner/name")
        assert time.monotonic() - started < 5
        snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--owner--name" / "refs").mkdir()
        (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
        model_name._asked_hub.cache_clear()
        check_model_name("model", "owner/name")
        assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_offline_by_choice(hub: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE blocks access to the hub" in refusal("owner/name")
    assert not hub.asked  # type: ignore[attr-defined]


def test_one_line_of_the_program(tmp_path: Path, tiny_student: Path) -> None:
    """A real process without a network: its one line, and no retries besides."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-P", "-m", "cli", "eval", "owner/name", "--data", "questions.json"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 110  # transformers' own retries take more than two minutes
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert re.match(
        r"Error: student 'owner/name' cannot be loaded \(no such folder, and the hub does not answer \(", line
    )
