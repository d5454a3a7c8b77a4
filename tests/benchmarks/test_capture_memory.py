from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from benchmarks import capture_memory
from benchmarks.memory import Watched
from cli import main


def test_the_rows_are_of_the_shape_that_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten views of two patches a side, and a newline for each of six rows of them."""

    def here(command: Sequence[str]) -> Watched:  # a process costs seconds of imports
        said = CliRunner().invoke(main, command[3:])
        assert said.exit_code == 0, said.output
        return Watched(said.output, 1.0, 5000.0, 5000.0)

    monkeypatch.setattr(capture_memory, "watched", here)
    capture_memory.main(["--rows", "3", "--width", "56", "--side", "28"])
    said = capsys.readouterr().out
    body = json.loads(said.splitlines()[-1])
    assert body["vision_tokens"] == 10 * 4 + 6
    assert body["peak_mib"] == 5000 > body["limit_mib"] and "MORE THAN THE LIMIT" in said
