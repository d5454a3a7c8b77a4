"""Signals that ask a process to end: at once where nothing is in hand, behind the work where it holds them back."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from cli import CommandGroup
from teacher_cache import stopping
from teacher_cache.stopping import SIGNALS, Stopped


@pytest.fixture
def listening() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping.listening():
        yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", SIGNALS)
def test_at_once(number: int) -> None:
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == caught.value.status == 128 + number and stopping.asked() == number
    os.kill(os.getpid(), number)  # what stops already is not disturbed
    with pytest.raises(Stopped, match=f"^stopped by {signal.Signals(number).name}: shard 3$"):
        stopping.check("shard 3")


@pytest.mark.usefixtures("listening")
def test_behind_the_work() -> None:
    done = []
    with pytest.raises(Stopped), stopping.held():
        with stopping.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


@pytest.mark.usefixtures("listening")
def test_an_error_of_the_work_says_more() -> None:
    with pytest.raises(ValueError, match="its own"), stopping.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("its own")


def test_nobody_who_does_not_listen_is_touched() -> None:
    """A library changes no signals, and each command begins afresh."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping.held():
        assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(Stopped), stopping.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    with stopping.listening(), stopping.listening():
        assert not stopping.asked()
        stopping.check()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    other = threading.Thread(target=stopping.listen)  # signals come to the main thread alone
    other.start()
    other.join()


def test_it_travels() -> None:
    stop = pickle.loads(pickle.dumps(Stopped(signal.SIGUSR1, "here")))
    assert (stop.number, stop.code, str(stop)) == (signal.SIGUSR1, 138, "stopped by SIGUSR1: here")


@pytest.mark.parametrize(("rank", "said"), [(None, "stopped by SIGTERM\n"), ("0", "stopped by SIGTERM\n"), ("3", "")])
def test_the_program_says_it_in_one_line(rank: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    command = click.Command("wait", callback=lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = CliRunner().invoke(CommandGroup("program", commands={"wait": command}), ["wait"])
    assert (result.exit_code, result.stderr, result.stdout) == (143, said, "")


def test_a_signal_inside_a_finalizer_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """Python drops what a ``__del__`` raises, and tells of it in a traceback."""

    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    before = sys.unraisablehook
    with stopping.listening():
        with pytest.raises(Stopped) as caught:
            Dying()
            time.sleep(10)
        assert caught.value.number == signal.SIGTERM
    assert sys.unraisablehook is before and capfd.readouterr().err == ""
