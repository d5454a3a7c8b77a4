"""Do the tests that need a GPU pass on this one?

    python -m benchmarks.gpu_tests --device cuda

They are skipped by `make test` where there is no GPU; ``--device cpu`` rehearses all but Liger-Kernel's, which has no CPU kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import finish, machine, print_table

TESTS = (
    "tests/student_train/test_on_a_gpu.py",
    "tests/pipelines/test_on_a_gpu.py",
    "tests/student_train/test_liger.py",
)
ROOT = Path(__file__).parent.parent


class Outcomes:
    """A plug-in of pytest that counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files, or single tests")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu_tests-<machine>.json")
    options = parser.parse_args(arguments)
    os.environ["KDCLI_TEST_DEVICE"] = options.device
    os.chdir(ROOT)
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:xdist", *options.tests], plugins=[outcomes])
    counts = {name: outcomes.counts[name] for name in ("passed", "failed", "skipped")}
    print_table(list(counts), [list(counts.values())])
    body = {"machine": machine(options.device), "shapes": "tests", **counts, "failures": outcomes.failed}
    finish("gpu_tests", body, options.save)
    sys.exit(bool(outcomes.failed) or not counts["passed"])


if __name__ == "__main__":
    main()
