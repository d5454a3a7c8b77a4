"""What the readers of files share whose rows name images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from teacher_cache.sources import DataSpec, files
from teacher_cache.sources.image_folder import ImageFolder


@dataclass(frozen=True)
class FilesAndImages:
    """One or more files of a format, and where their images lie. Holds no open file: any thread may read.

    Attributes:
        images: of the spec's root; without one, of the folder of the first file.
    """

    FORMAT: ClassVar[str]
    spec: DataSpec
    paths: tuple[str, ...]
    images: ImageFolder

    @classmethod
    def of(cls, spec: DataSpec, paths: Sequence[str]) -> Self:
        root = spec.image_root if spec.image_root is not None else os.path.dirname(paths[0]) or "."
        return cls(spec, tuple(paths), ImageFolder(root, spec.follow_links))

    def fingerprint(self) -> dict[str, Any]:
        return files.fingerprint_files(self.FORMAT, list(self.paths))
