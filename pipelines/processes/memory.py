"""Memory that a large model leaves behind."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Free pages go back to the system: glibc keeps those between small live blocks, gigabytes after a model, and the next one needs new
    ones beside them. Nothing happens with another C library."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
