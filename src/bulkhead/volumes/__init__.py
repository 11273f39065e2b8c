"""Floor 5: named volumes."""
