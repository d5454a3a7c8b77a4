"""The errors a user may meet: each is one line that names the place and the fix."""

from __future__ import annotations


class KdcliError(Exception):
    """Anything the user can mend. The command line prints it as one line and exits with status 1."""


class DataError(KdcliError):
    """A mixture cannot be read at all (missing file, unreadable json, absent image root)."""


class CacheError(KdcliError):
    """A cache is damaged, incomplete, of another plan, or lacks what was asked of it."""


class CompatibilityError(KdcliError):
    """Two sides that must agree (teacher, student, tokenizer, template, cache) do not."""


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
