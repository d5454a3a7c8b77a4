"""The errors a user may meet: each is one line that names the place and the fix."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class KdcliError(Exception):
    """Anything the user can mend. The command line prints it as one line and exits with status 1."""


class DataError(KdcliError):
    """A mixture cannot be read at all (missing file, unreadable json, absent image root)."""


class CacheError(KdcliError):
    """A cache is damaged, incomplete, of another plan, or lacks what was asked of it."""


class CompatibilityError(KdcliError):
    """Two sides that must agree (teacher, student, tokenizer, template, cache) do not."""


@contextmanager
def naming_full_disk(place: object) -> Iterator[None]:
    """Around what writes below ``place``: a full disk becomes one line that says where. Writers of files tell it in several ways."""
    try:
        yield
    except Exception as error:
        words = f"{error} {error.__cause__ or ''}"
        if getattr(error, "errno", None) in FULL or (not isinstance(error, KdcliError) and "No space left" in words):
            reason = (
                os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "No space left on device"
            )
            raise KdcliError(
                f"{place}: {reason}: what is complete stays; make room and run the same command again"
            ) from None
        raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SkipRow(Exception):
    """One row cannot be used: it becomes a skip record, never another row.

    Args:
        reason: a short code out of ``SKIP_REASONS``.
        detail: what was seen, in words, for the person who mends the data.
    """

    def __init__(self, reason: str, detail: str):
        if reason not in SKIP_REASONS:
            raise ValueError(f"unknown skip reason {reason!r}")
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


SKIP_REASONS = {
    "image_missing": "the image file named by the row does not exist, or its bytes are null or empty",
    "image_corrupt": "the image bytes do not decode (truncated file, not an image)",
    "image_too_large": "the image has more pixels than the limit (decompression bomb)",
    "image_path_unsafe": "the image path leaves the image root",
    "placeholder_mismatch": "the number of <image> placeholders differs from the number of images",
    "empty_answer": "an assistant turn is empty",
    "no_answer": "the row has no assistant turn",
    "bad_turn_order": "turns do not alternate user, assistant, starting with the user",
    "bad_row": "the row is not of the format's shape (missing key, wrong type)",
    "over_length": "the row has more tokens than the limit",
    "reserved_token": "the text holds a token that the template or the model reserves",
    "processor_refused": "the model's processor does not take the row",
    "nonfinite_teacher": "the teacher's output holds NaN or infinity",
}
