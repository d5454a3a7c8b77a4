"""Image files under one root that no row can leave."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from dataclasses import dataclass
from urllib.parse import quote

from teacher_cache.errors import DataError, SkipSample
from teacher_cache.records import Image
from teacher_cache.shards.places import is_remote, local_path, place_of
from teacher_cache.shards.remote import READ_ONLY
from teacher_cache.sources.image_refs import ImageRef

MAX_IMAGE_BYTES = 256 << 20
"""A larger encoded image is skipped: it would be read whole into memory, and no photograph is that large."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR}


@dataclass(frozen=True)
class ImageFolder:
    """Reads images by the path a row names, relative to ``root`` (a local folder or an fsspec URL).

    The root itself may be a link. follow_links: links inside it may lead out of it; False: they are refused like ``..``, since whoever
    packed the images could have made them.
    """

    root: str
    follow_links: bool = False

    def check(self) -> None:
        """Raises:
        DataError: the root is no folder. Called before the first image, so that it is not 600,000 missing images.
        """
        # Object stores have no folders, and not all list what they serve: there the images themselves tell.
        if not is_remote(self.root) and not local_path(self.root).is_dir():
            raise DataError(f"image root {self.root} is not a folder; pass --image-root, where image paths start")

    def fetch(self, ref: ImageRef) -> Image:
        """The image of a row, from here or from the row itself; raises as ``check`` and ``read`` do, and image_corrupt."""
        if ref.inline is None:
            self.check()
            return Image(ref.name, self.read(ref.name))
        data = ref.decode()
        check_size(ref.name, len(data))
        return Image(ref.name, data)

    def read(self, name: str) -> bytes:
        """The file's bytes exactly as they are.

        Raises:
            SkipSample: image_path_unsafe, image_missing (also empty or unreadable by permission), image_too_large.
            DataError: the disk or the network failed: that is not the row's fault, and skipping would hide it.
        """
        data = self._read_remote(name) if is_remote(self.root) else self._read_local(name)
        if not data:
            raise SkipSample("image_missing", f"{name!r} is empty (0 bytes)")
        return data

    def _read_local(self, name: str) -> bytes:
        given = local_path(self.root)
        root = os.path.realpath(given)
        written = os.path.normpath(os.path.join(root, name))
        if not _is_below(written, root) and not _is_below(written, os.path.abspath(given)):
            mend = ": --image-root is the folder that a path must be below" if os.path.isabs(name) else ""
            raise SkipSample("image_path_unsafe", f"{name!r} leaves the image root (to {written!r}){mend}")
        try:
            path = os.path.realpath(os.path.join(root, name))
        except ValueError as error:
            raise SkipSample("image_path_unsafe", f"{name!r} is not a path: {error}") from error
        # A link that stays inside the root is fine; one that leads out would let a data set read any file here.
        if not _is_below(path, root) and not self.follow_links:
            raise SkipSample(
                "image_path_unsafe",
                f"{name!r} leads out of the image root by a link (to {path!r}); is the link yours? follow_links = true, --follow-links",
            )
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise SkipSample("image_missing", f"{name!r} is not a regular file")
            check_size(name, status.st_size)
            with open(path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise _absent_or_broken(name, error) from error

    def _read_remote(self, name: str) -> bytes:
        place = place_of(self.root)
        filesystem, root = place.open()
        below = posixpath.normpath(name)
        if name.startswith("/") or below.split("/")[0] in ("", ".", ".."):
            raise SkipSample("image_path_unsafe", f"{name!r} leads out of the image root")
        # A row names a file: what a web address reads otherwise (# ? %) is part of its name.
        path = f"{root.rstrip('/')}/{quote(below) if place.scheme in READ_ONLY else below}"
        try:
            check_size(name, filesystem.size(path) or 0)
            return bytes(filesystem.cat_file(path))
        except OSError as error:
            raise _absent_or_broken(name, error) from error


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([root, path]) == root


def check_size(name: str, size: int) -> None:
    """SkipSample where an encoded image is larger than ``MAX_IMAGE_BYTES``."""
    if size > MAX_IMAGE_BYTES:
        raise SkipSample("image_too_large", f"{name!r} has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")


def _absent_or_broken(name: str, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError) or error.errno in _ABSENT:
        mend = (
            " (folders are parted by / here)" if "\\" in name else " (mind the blanks)" if name != name.strip() else ""
        )
        return SkipSample("image_missing", f"{name!r} does not exist under the image root{mend}")
    if isinstance(error, PermissionError):
        return SkipSample("image_missing", f"{name!r} exists but may not be read (permission denied)")
    return DataError(f"image {name!r} cannot be read: {error.strerror or error}; check the disk, then re-run")
