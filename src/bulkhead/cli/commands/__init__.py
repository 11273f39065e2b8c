"""Floor 8: the commands, one lazily imported module per family of words."""
