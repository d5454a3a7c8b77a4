"""The commands, by what a user does with them, and what the command line says of itself. Nothing heavy is imported before one runs."""
