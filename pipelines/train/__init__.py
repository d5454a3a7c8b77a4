"""``kdcli train-student``: stages planned, checked, trained, and written down."""
