"""The rooms of ``kdcli eval``: which questions a file asks, how a model answers them, how answers are scored."""
