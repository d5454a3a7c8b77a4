"""Judging before and after: ``doctor``, ``plan``, ``preflight``, ``fidelity``, ``eval``, and label errors."""
