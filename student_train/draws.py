"""Seeds of what a step draws, from the numbers that name it: the same in every version of Python and on every machine."""

from __future__ import annotations

import hashlib

VERSION = 2
"""Of the draws that a seed gives: a stage that was begun with others is not continued with these (1 took Python's ``hash``)."""


def draw_seed(*numbers: int) -> int:
    """A seed of 63 bits: the head of BLAKE2b over the numbers (integers of 64 bits, big-endian, signed), less its lowest bit.

    Another count of numbers gives another seed, trailing zeros or not.
    """
    data = b"".join(number.to_bytes(8, "big", signed=True) for number in numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
