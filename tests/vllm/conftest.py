"""`make test-vllm` runs this folder in an environment with vLLM; the ordinary tests, which have none, leave it out."""

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
