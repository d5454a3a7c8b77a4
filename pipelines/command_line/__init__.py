"""What the command line says of itself: help in the order of work, examples, completion. Imports nothing heavy."""
