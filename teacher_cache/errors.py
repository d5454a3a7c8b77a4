"""The errors a user may meet: each is one line that names the place and the fix."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters that a terminal obeys, but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of the text around them
    "\u2028\u2029\ud800-\udfff]"  # line breaks that no tool counts; halves of surrogate pairs, which no stream takes
)


_SECRETS = (
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s?#'\"<>]*:[^/\s?#'\"<>]*@", re.I), r"\1***@"),
    (re.compile(r"(https?://)[^/\s?#'\"<>@]+@", re.I), r"\1***@"),
    (
        re.compile(
            r"([?&;](?:[\w.%-]*(?:signature|token|secret|passw|pwd|credential|apikey|accesskey)[\w.%-]*|(?:[\w.-]*[-_])?(?:key|sig|auth|sas))=)"
            r"[^&#\s'\"<>]+",
            re.I,
        ),
        r"\1***",
    ),
    (
        re.compile(r"\b([A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY|API_KEY)[A-Z0-9_]*\s*[=:]\s*)[^\s'\",]+"),
        r"\1***",
    ),
    (re.compile(r"\b(hf_|ghp_|AKIA)[A-Za-z0-9]{12,}"), r"\1***"),
)
"""Of an address: user and password, signatures and keys of its query; of other text: what keys look like."""


def without_secrets(text: str) -> str:
    """The text with ``***`` in place of passwords, signatures and tokens: whatever is shown or written for others goes through here."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def stripped(body: Any) -> Any:
    """The same of every text of a JSON document, keys aside."""
    if isinstance(body, dict):
        return {key: stripped(one) for key, one in body.items()}
    if isinstance(body, (list, tuple)):
        return [stripped(one) for one in body]
    return without_secrets(body) if isinstance(body, str) else body


def printable(text: str) -> str:
    """What came out of data, safe to show: characters that a terminal obeys become ``\\u001b`` (also valid inside JSON text), secrets
    ``***``."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", without_secrets(text))


def one_line(error: object) -> str:
    """An error as the one line that a terminal or a log gets."""
    return printable(" ".join(str(error).split()))


class KdcliError(Exception):
    """Anything the user can mend. The command line prints it as one line and exits with status 1."""


class DataError(KdcliError):
    """A mixture cannot be read at all (missing file, unreadable json, absent image root)."""


class CacheError(KdcliError):
    """A cache is damaged, incomplete, of another plan, or lacks what was asked of it."""


class DiskError(KdcliError):
    """A disk does not take what is to be written; nothing is wrong with the work itself, which can be run again."""


class CompatibilityError(KdcliError):
    """Two sides that must agree (teacher, student, tokenizer, template, cache) do not."""


class OutOfMemory(KdcliError):
    """The machine or GPU has too little memory for what was asked of it at a time; the line names the setting."""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up (tokenizers, safetensors): no ``Exception`` to Python, and no reason to end a job."""
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory, in Python's words, torch's of the CPU, or a GPU's."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"
            or any(
                one in said for one in ("allocate memory", "out of memory", "not enough memory", "DefaultCPUAllocator")
            )
        )
    )


def not_loaded(what: str, error: Exception) -> KdcliError:
    """The one line for a model that transformers does not load; names the flag where its folder wants to run code of its own."""
    if "trust_remote_code" in str(error):
        return KdcliError(
            f"{what} brings program code of its own, which is not run: read that code, then give --trust-remote-code "
            "(or trust_remote_code = true in kd.toml), or use a model that transformers knows"
        )
    reason = next(filter(None, str(error).splitlines()), type(error).__name__)
    if isinstance(error, ImportError):
        return KdcliError(
            f"{what} cannot be loaded ({reason.split('. ')[0]}): install what is missing "
            "(`pip install 'kdcli[families]'` brings torchvision)"
        )
    return KdcliError(f"{what} cannot be loaded ({reason}): give a model folder or a hub id")


def check_reads_images(what: str, processor: Any, config: Any) -> None:
    """CompatibilityError where a model has no image processor beside its tokenizer, or no image token: a text model, or another task's."""
    lacks = {
        "image processor beside its tokenizer": getattr(processor, "image_processor", None),
        "tokenizer": getattr(processor, "tokenizer", None),
        "image_token_id in its configuration": getattr(config, "image_token_id", None),
    }
    missing = next((name for name, there in lacks.items() if there is None), None)
    if missing:
        raise CompatibilityError(
            f"{what} ({type(config).__name__}, {type(processor).__name__}) has no {missing}: "
            "give a model that reads images and text (image-text-to-text)"
        )


@contextmanager
def naming_full_disk(place: object) -> Iterator[None]:
    """Around what writes below ``place``: a full disk becomes one line that says where. Writers of files tell it in several ways."""
    try:
        yield
    except Exception as error:
        if (number := _full(error)) is not None:
            raise DiskError(f"{place}: {os.strerror(number)}: {advice(OSError(number, ''))}") from None
        raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TAKES_NOTHING = (*FULL, errno.EROFS)
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _full(error: Exception) -> int | None:
    """The number of an error that says that a disk takes nothing (more); libraries that are not Python's say it in words alone."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _TAKES_NOTHING or isinstance(error, KdcliError):
        return number
    words = f"{error} {error.__cause__ or ''}"
    return next((one for one in _TAKES_NOTHING if os.strerror(one) in words), None)


def is_of_disk(error: Exception) -> bool:
    """Whether work ended because a disk takes no more: it is as good as before, and can be run again."""
    words = str(error)
    return isinstance(error, DiskError) or any(os.strerror(one) in words for one in _TAKES_NOTHING)


def advice(error: OSError) -> str:
    """What helps against an error of a disk that something was to be written to."""
    if error.errno in FULL:
        return "complete files are kept; make room and run the same command again"
    if error.errno in NOT_ALLOWED:
        return "name a place that you may write to"
    return "name another place, or fix this one, and run the same command again"


class SkipSample(Exception):
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


@contextmanager
def refusing_row(what: str) -> Iterator[None]:
    """Around what a model's processor, or what is known of it, makes of one row: whatever it raises is a skip record of that row.

    What concerns the model as a whole is a ``KdcliError`` and passes; so does a lack of memory.
    """
    try:
        yield
    except (KdcliError, SkipSample):
        raise
    except BaseException as error:
        if out_of_memory(error) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        said = one_line(error)
        told = said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}".rstrip(": ")
        raise SkipSample("processor_refused", f"{what}: {told}") from None


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
    "media_unsupported": "the row has video or audio, which kdcli does not read",
    "tools_unsupported": "the row calls a tool or holds a tool's answer, which no template here writes",
    "not_for_training": "the row, or an answer in it, is marked as no label (weight 0, train false)",
    "over_length": "the row has more tokens than the limit",
    "reserved_token": "the text holds a token that the template or the model reserves",
    "template_refused": "the model's chat template refuses the row, or labels cannot be placed in what it writes",
    "unknown_token": "the text holds a token for which the model's embedding has no row",
    "processor_refused": "the model's processor refuses the row",
    "images_unread": "the row has images, and the model is text-only",
    "nonfinite_teacher": "the teacher's output holds NaN or infinity",
}

ROW_NOTES = {
    "columns_unused": "the row has columns or keys that change training elsewhere and are not used here",
    "image_in_answer": "an answer contains <image>: the image is placed there",
}
"""What is worth knowing of a row that is used."""
