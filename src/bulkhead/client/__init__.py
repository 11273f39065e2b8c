"""Floor 8: the Python SDK."""
