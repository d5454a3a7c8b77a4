"""What ``import kdcli`` gives: a cache as datasets, batches, signals and losses, for loops of other people (docs/library.md)."""
