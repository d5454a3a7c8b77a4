"""One zstd frame around the bytes of one member, with its length and a checksum, so that a reader allocates nothing it did not mean to."""

from __future__ import annotations

import zstandard

from teacher_cache.errors import CacheError, KdcliError

LEVEL = 1
"""Byte-split numbers gain nothing from higher levels."""
MOST_BYTES = 1 << 29
"""An attention map of 28 heads, 2,048 text and 7,290 vision tokens is 418 million."""


def compress(data: bytes, level: int = LEVEL) -> bytes:
    """One frame; the same bytes for the same version of zstd. KdcliError where it is more than a reader takes."""
    if len(data) > MOST_BYTES:
        raise KdcliError(f"a record of {len(data)} bytes, at most {MOST_BYTES} are read: store less per row")
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    return compressor.compress(data)


def decompress(data: bytes, place: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of ``compress``.

    Raises:
        CacheError: naming ``place`` where the frame is damaged, says no length, is followed by other bytes, or is longer than ``most``
            (checked before anything is allocated).
    """
    try:
        length = zstandard.frame_content_size(data)
        if length < 0:
            raise CacheError(f"{place}: a compressed frame without its length: it was not written by kdcli")
        if length > (most := min(most, MOST_BYTES)):
            raise CacheError(f"{place}: a compressed frame of {length} bytes, at most {most} are read")
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise CacheError(f"{place}: a damaged compressed frame ({error}): run `kdcli cache verify`") from None
    if len(plain) != length:
        raise CacheError(f"{place}: a damaged compressed frame (it ends early): run `kdcli cache verify`")
    return plain
