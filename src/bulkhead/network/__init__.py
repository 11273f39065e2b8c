"""Floor 5: bridges, addresses, names and published ports."""
