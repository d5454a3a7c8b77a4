"""Readers of the mixtures users bring: one file a format, found by folder.

A source module defines ``FORMAT`` (its name), ``matches(paths) -> bool`` and ``open(spec, paths) -> Source``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from teacher_cache.errors import DataError
from teacher_cache.plugins import with_plugins
from teacher_cache.records import RowGroup, Sample, SkipRecord
from teacher_cache.sources.files import expand_paths
from teacher_cache.sources.foreign import described, refuse_foreign


@dataclass(frozen=True)
class DataSpec:
    """One mixture part as the user names it.

    Attributes:
        part: name of the part (``caption``, ``sft``, …); training stages select parts by name.
        path: file, glob or brace URL; several files of one format make one part.
        image_root: folder that relative image paths start from; default: the folder of the first file.
        format: format of the files: ``llava-json``, ``llava-next-parquet``, ``messages-jsonl``, ``webdataset``; default: detected.
        template: text template of rows: ``chat`` (the model's own), ``plain`` (image and caption), ``v1`` (Vicuna), ``qwen_1_5`` (ChatML).
        limit: use only this many first rows.
        max_image_pixels: larger images are skipped (decompression bombs).
        follow_links: follow links below ``image_root`` that lead out of it (docs/security.md).
    """

    part: str
    path: str
    image_root: str | None = None
    format: str | None = None
    template: str = "chat"
    limit: int | None = None
    max_image_pixels: int = 89_478_485
    follow_links: bool = False


class Source(Protocol):
    """One mixture part that can be scanned once and then read group by group, in any order, by any process."""

    def scan(self, group_rows: int) -> list[RowGroup]:
        """Pass over the files once, in bounded memory; groups in file order that cover every row exactly once."""
        ...

    def read(self, group: RowGroup) -> Iterator[Sample | SkipRecord]:
        """The rows of one group in order, exactly ``group.rows`` items; a row that cannot be read is a SkipRecord."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What binds a plan to this data: format, and name, size and sha256 of every file.

        Image files are bound row by row, by the row's key.
        """
        ...


def source_modules() -> dict[str, Any]:
    """Every source format by name, those of installed packages too (``kdcli.sources``)."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "FORMAT"):
            found[module.FORMAT] = module
    return dict(sorted(with_plugins("kdcli.sources", found, _names).items()))


def _names(module: Any) -> tuple[str]:
    _ = module.matches, module.open
    return (module.FORMAT,)


def open_source(spec: DataSpec) -> Source:
    """Find the files of a part (path, glob, braces; sorted), find their format unless it is given, and open them.

    Raises:
        DataError: a file is missing, no format fits, or the spec is not sensible.
    """
    if spec.limit is not None and spec.limit < 0:
        raise DataError(f"part {spec.part!r}: limit is {spec.limit}; give a number of rows, 0 or more")
    modules = source_modules()
    if spec.format is not None and spec.format not in modules:
        raise DataError(f"unknown format {spec.format!r}; valid formats: {', '.join(modules)}")
    paths = expand_paths(spec.path)
    for path in paths:
        refuse_foreign(path)
    if spec.format is not None:
        return modules[spec.format].open(spec, paths)
    fitting = [name for name, module in modules.items() if module.matches(paths)]
    if len(fitting) != 1:
        raise DataError(_no_format(paths, fitting, list(modules)))
    return modules[fitting[0]].open(spec, paths)


def _no_format(paths: list[str], fitting: list[str], formats: list[str]) -> str:
    if not fitting and (what := described(paths[0])):
        return f"{paths[0]} is of no known format: {what}"
    found = f"fits several formats ({', '.join(fitting)})" if fitting else "is of no known format"
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more} {found}; files of a part share one format, name it: {', '.join(formats)}"
