"""``kdcli cache inspect | status | verify | gc``: looking at a cache without any model."""
