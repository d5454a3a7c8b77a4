"""Prepared batch → TeacherOutput: one file a backend."""
