"""Executors only schedule: each runs a task over shard ids, nothing more."""
