"""A slice → its shard: the line that reads, prepares, asks the teacher, encodes and writes."""
