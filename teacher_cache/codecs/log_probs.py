"""Log-probabilities (nats, ≤ 0) in uniform steps: symbol = round(−log p / step), error at most step / 2.

In rows that fall (by rank) neighbours differ by little, so the first value and the falling differences are stored: two bytes for the
first, one for every other place, and what does not fit there is escaped and written whole. −inf (a token without any mass) has a
symbol of its own.
"""

from __future__ import annotations

import numpy as np
import torch

from teacher_cache.errors import CacheError, KdcliError

INFINITE = (1 << 31) - 1
"""Symbol of −inf, above that of every finite value."""
FIRST_ESCAPE, ESCAPE = (1 << 16) - 1, (1 << 8) - 1


def quantise(log_probs: torch.Tensor, step: float) -> torch.Tensor:
    """int64 symbols of float values ≤ 0, any shape.

    Raises:
        KdcliError: NaN, a value above 0, or one so low that the step has no symbol for it.
    """
    if not 0 < step < float("inf"):
        raise KdcliError(f"log-probs are stored in steps above 0 nats, not {step}")
    wide = log_probs.to(torch.float64)
    if not bool((wide <= 0).all()):  # NaN is not ≤ 0 either
        wrong = wide[~(wide <= 0)].reshape(-1)[0]
        raise KdcliError(f"log-prob {float(wrong):g} is not in (-inf, 0]")
    steps = (-wide / step).round()
    finite = torch.isfinite(wide)
    if bool((steps[finite] >= INFINITE).any()):
        raise KdcliError(
            f"log-prob {float(wide[finite].min()):g} is out of range for steps of {step} nats: raise the step"
        )
    return torch.where(finite, steps, INFINITE).to(torch.int64)


def dequantise(symbols: torch.Tensor, step: float) -> torch.Tensor:
    """float32, each within step / 2 of what was quantised (and float32's own rounding); −inf comes back as −inf."""
    return torch.where(symbols == INFINITE, -torch.inf, symbols.to(torch.float64) * -step).to(torch.float32)


def falling_differences(symbols: torch.Tensor) -> torch.Tensor:
    """int64 ``[R, K]`` ≥ 0: every row's first symbol, then by how much each log-prob is below the one before."""
    differences = torch.diff(symbols, dim=1, prepend=symbols.new_zeros(len(symbols), 1))
    if bool((differences < 0).any()):
        raise KdcliError("log-probs must fall along a row to be stored by their differences: sort them by rank")
    return differences


def encode(log_probs: torch.Tensor, step: float) -> torch.Tensor:
    """uint8 bytes of falling rows ``[R, K]``: R little-endian uint16, then R·(K − 1) bytes place by place, then escaped uint32."""
    differences = falling_differences(quantise(log_probs, step)).T.contiguous().numpy()
    first, rest = differences[:1].reshape(-1), differences[1:].reshape(-1)
    escaped = np.concatenate([first[first >= FIRST_ESCAPE], rest[rest >= ESCAPE]])
    parts = (
        np.minimum(first, FIRST_ESCAPE).astype("<u2"),
        np.minimum(rest, ESCAPE).astype(np.uint8),
        escaped.astype("<u4"),
    )
    return torch.from_numpy(np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8).copy())


def decode(data: torch.Tensor, rows: int, k: int, step: float) -> torch.Tensor:
    """float32 ``[R, K]`` of ``encode``; CacheError where the bytes are not of that many rows."""
    raw = data.numpy().tobytes()
    places = 2 * rows + rows * max(0, k - 1) if k else 0
    if len(raw) < places:
        raise CacheError(f"{len(raw)} bytes do not hold {rows} rows of {k} log-probs: run `kdcli cache verify`")
    count = rows if k else 0
    first = np.frombuffer(raw, "<u2", count).astype(np.int64)
    rest = np.frombuffer(raw, np.uint8, places - 2 * count, 2 * count).astype(np.int64)
    outside = np.concatenate([first == FIRST_ESCAPE, rest == ESCAPE])
    if len(raw) != places + 4 * int(outside.sum()):
        raise CacheError("coded log-probs have not as many escaped values as they say: run `kdcli cache verify`")
    differences = np.concatenate([first, rest])
    differences[outside] = np.frombuffer(raw, "<u4", -1, places)
    return dequantise(torch.from_numpy(differences.reshape(k, rows).T.copy()).cumsum(dim=1), step)
