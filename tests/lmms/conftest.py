"""These tests run inside lmms-eval (`make test-lmms` installs it into an environment of its own); elsewhere they are not collected."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("lmms_eval") else ["test_*.py"]
