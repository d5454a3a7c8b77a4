"""``kdcli cache-teacher``: the plan, the workers that write shards, what they say while they run, and who may write."""
