"""Losses return per-row or per-sample values; masking, averaging and chunking happen in ``reduce`` only."""
