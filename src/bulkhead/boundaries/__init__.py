"""Floor 4: the boundaries themselves."""
