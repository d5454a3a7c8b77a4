"""Samples → N fixed slices: the plan, its file, and whether today's samples are those of the plan."""
