"""Processes of this machine: cores, threads that wait asleep, children that end with their parent."""
