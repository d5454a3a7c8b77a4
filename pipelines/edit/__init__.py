"""``kdcli cache add-field | drop-field | subset | merge | repair``: editing an existing cache."""
