"""What the terminal shows of any command: progress bars and text tables."""
