"""A finished cache, opened and read: its samples, and what was stored of each."""
