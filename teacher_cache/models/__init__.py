"""What both sides use of a network: loading it, its head product, attention of a few rows."""
