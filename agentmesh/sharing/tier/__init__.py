"""A folder that keeps KV and what links have learned beyond one process; misses are its only failures."""
