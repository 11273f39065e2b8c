"""Floor 6: the only writer of lifecycle state."""
