"""One script a question; run as ``python -m benchmarks.NAME``, under the thread policy that the command line has."""

import pipelines.processes.quiet_threads  # noqa: F401 (before torch)
