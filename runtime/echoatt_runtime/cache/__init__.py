"""The memory of the key/value cache."""
