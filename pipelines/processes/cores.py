"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroup: Path = CGROUP, own: Path = OWN) -> int:
    """Those that the kernel lets it run on, or fewer where its control group (of a container, or a job) has a quota of time."""
    return int(max(1, min(len(os.sched_getaffinity(0)), _quota(cgroup, own))))


def _quota(cgroup: Path, own: Path) -> float:
    """Cores' worth of time, infinite without a quota: the smallest of the group's own and of all around it."""
    found = [math.inf]
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "cpu" not in kinds.split(","):
                continue
            root = cgroup / "cpu" if kinds else cgroup
            inside = root / path.lstrip("/")
            found += [_of_group(one) for one in (inside, *inside.parents) if one.is_relative_to(root)]
    return min(found)


def _of_group(folder: Path) -> float:
    """cgroup v2: ``cpu.max``; v1: ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``, -1 for none."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        used = [int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")]
        return used[0] / used[1] if min(used) > 0 else math.inf
    return math.inf
