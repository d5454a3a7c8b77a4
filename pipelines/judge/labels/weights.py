"""The file that leaves suspected answers out of a term: ``--select reg=file:PATH:right``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.judge.labels.answers import JudgedAnswer
from pipelines.judge.labels.survey import Survey
from teacher_cache.reading.cached_samples import CachedSample
from teacher_cache.whole_file import naming_file, refuse_unwritable, write_whole

COLUMN = "right"


class WeightsFile:
    """One line a row: ``{"key", "part", "right", "score"}``, the lists with a number for each answer.

    ``right`` is 0 for a suspected answer, else 1; ``score`` is ``JudgedAnswer.score``, null where the teacher contradicts nothing. Which
    are suspected is known behind the last row alone, so scores wait in a temporary file.

    Raises:
        DiskError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        refuse_unwritable(path)
        self._waiting = tempfile.TemporaryFile("w+", encoding="utf-8")

    def add(self, row: CachedSample, answers: Sequence[JudgedAnswer]) -> None:
        scores = [one.score if one.contradicted else None for one in answers]
        with naming_file(Path(tempfile.gettempdir())):
            self._waiting.write(json.dumps({"key": row.key, "part": row.sample.part, "score": scores}) + "\n")

    def finish(self, made: Survey) -> None:
        """The file is there whole or not at all."""
        with naming_file(Path(tempfile.gettempdir())):
            self._waiting.seek(0)
            lines = "".join(self._lines(made.cut))
        self._waiting.close()
        write_whole(self.path, lines)

    def _lines(self, cut: float) -> Iterator[str]:
        for line in self._waiting:
            body = json.loads(line)
            right = [int(one is None or one < cut) for one in body["score"]]
            score = [None if one is None else round(one, 3) for one in body["score"]]
            yield json.dumps({**body, COLUMN: right, "score": score}) + "\n"
