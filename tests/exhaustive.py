"""Which parameters of a test run in `make test`; the others run in `make test-all` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def of_all(values: Iterable[Any], *kept: Any) -> list[Any]:
    """``values`` of ``pytest.mark.parametrize``; those not ``kept`` are marked ``exhaustive``."""
    listed = list(values)
    assert kept and all(one in listed for one in kept), f"{kept} of {listed}"
    each = [(one, one if isinstance(one, tuple) else (one,)) for one in listed]
    return [one if one in kept else pytest.param(*own, marks=pytest.mark.exhaustive) for one, own in each]
